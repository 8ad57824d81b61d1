"""Networks of the Jittor runtime from their YAML, with the golden weights; no torch, no Hydra."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import jittor as jt
import numpy as np
import yaml

from golden import DFormerGolden, dformer_bases, dformer_normal
from segmill.jittor import random
from segmill.jittor.load import load_arrays
from segmill.jittor.models.layers import resize

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model" / "discriminative"
SMALL_HEAD = {"ham_channels": 16, "channels": 8, "rank": 4}
BUILT = [r".+\.(angle|decay)", ".+tracked"]  # what the golden run left as it was built
ATOL = 1e-4  # float32; the official run itself is as far as 3.4e-5 from float64 in a stage


def twin(config: dict[str, Any], **changes: Any) -> Any:
    """The Jittor class of a `_target_`, with its arguments."""
    module, _, name = config["_target_"].removeprefix("segmill.").rpartition(".")
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    return partial(
        getattr(importlib.import_module(f"segmill.jittor.{module}"), name), **arguments | changes
    )


def build(
    variant: str,
    *,
    num_classes: int = 40,
    backbone: dict[str, Any] | None = None,
    head: dict[str, Any] | None = None,
) -> jt.Module:
    """The network of configs/model/discriminative/VARIANT.yaml with some sizes changed."""
    network = yaml.safe_load((CONFIGS / f"{variant}.yaml").read_text(encoding="utf-8"))["network"]
    decode_head = twin(network["decode_head"], **{"num_classes": num_classes} | (head or {}))
    trunk = twin(network["backbone"], **(backbone or {}))()
    return twin({"_target_": network["_target_"]})(backbone=trunk, decode_head=decode_head)


def official(name: str, variant: str, **changes: Any) -> jt.Module:
    """The variant with the golden weights."""
    network = build(variant, **changes)
    load_arrays(network, DFormerGolden(name).state(), rules=(), may_miss=BUILT)
    return network


def use_official_bases(monkeypatch: Any) -> None:
    """The factorisation starts from what the official code drew."""
    monkeypatch.setattr(random, "uniform", lambda shape: dformer_bases(*shape))


def golden_image(*, prefix: str = "", batch: int = 1, size: tuple[int, int] = (128, 160)) -> jt.Var:
    """The normalised RGB and depth of the golden run."""
    parts = (dformer_normal(f"{prefix}{k}", batch, n, *size) for k, n in (("rgb", 3), ("depth", 1)))
    return jt.array(np.concatenate(list(parts), axis=1))


def check_logits(name: str, variant: str) -> None:
    """Stages, logits and classes of the whole network are the official ones."""
    golden, network = DFormerGolden(name).data, official(name, variant).eval()
    with jt.no_grad():
        features = network.backbone(golden_image())
        logits = network.decode_head(features)
        upsampled = resize(logits, (128, 160)).numpy()
    for stage in (2, 3):
        theirs = golden[f"stage{stage}"]
        np.testing.assert_allclose(features[stage].numpy(), theirs, atol=ATOL, rtol=0)
    np.testing.assert_allclose(logits.numpy(), golden["head_logits"], atol=ATOL, rtol=0)
    centre = upsampled[:, :, 56:72, 72:88]
    np.testing.assert_allclose(centre, golden["logits_centre"], atol=ATOL, rtol=0)
    assert np.array_equal(upsampled.argmax(1), golden["argmax"])


def check_names(name: str, variant: str) -> None:
    """Names, shapes and types of a file, and what may be updated, are the official ones."""
    meta, network = DFormerGolden(name).meta, build(variant)
    arrays = network.named_arrays()
    assert {key: list(array.shape) for key, array in arrays.items()} == meta["state_dict"]
    for key, array in arrays.items():
        assert array.dtype == (np.int64 if key.endswith("num_batches_tracked") else np.float32)
    trainable = network.trainable()
    assert sum(var.numel() for var in trainable.values()) == meta["n_params"]
    trunk = [var.numel() for key, var in trainable.items() if key.startswith("backbone.")]
    assert sum(trunk) == meta["n_params_backbone"]
    norms = {
        key: [module.eps, module.momentum]
        for key, module in network.named_modules()
        if type(module).__name__ == "BatchNorm2d"
    }
    assert norms == meta["bn_eps_momentum"]
