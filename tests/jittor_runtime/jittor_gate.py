"""Networks of the Jittor runtime from their YAML, with the golden weights."""

from typing import Any

import jittor as jt
import numpy as np

from golden import DFormerGolden, dformer_bases, dformer_normal
from segmill import configuration
from segmill.configuration import compose
from segmill.jittor import random
from segmill.jittor.load import load_arrays
from segmill.jittor.models.layers import resize
from segmill.twins import with_twins

BUILT = [r".+\.(angle|decay)", ".+tracked"]  # what the golden run left as it was built
ATOL = 1e-4  # float32; the official run itself is as far as 3.4e-5 from float64 in a stage
SMALL_HEAD = (
    "model.network.decode_head.ham_channels=16",
    "model.network.decode_head.channels=8",
    "model.network.decode_head.rank=4",
)
NOTHING_DROPPED = (
    "model.network.backbone.drop_path_rate=0",
    "model.network.decode_head.dropout=0",
)


def build(variant: str, *overrides: str, num_classes: int = 40) -> jt.Module:
    """The network of configs/model/discriminative/VARIANT.yaml."""
    choices = [f"model={variant}", "data=nyu_depth_v2", "runtime=jittor"]
    config = compose("train", [*choices, f"data.num_classes={num_classes}", *overrides])
    return configuration.build(with_twins(config).model.network)


def official(name: str, variant: str, *overrides: str) -> jt.Module:
    """The variant with the golden weights."""
    network = build(variant, *overrides)
    load_arrays(network, DFormerGolden(name).state(), rules=(), may_miss=BUILT)
    return network


def use_official_bases(monkeypatch: Any) -> None:
    """The factorisation starts from what the official code drew."""
    monkeypatch.setattr(random, "uniform", lambda shape: dformer_bases(*shape))


def golden_image(*, prefix: str = "", batch: int = 1, size: tuple[int, int] = (128, 160)) -> jt.Var:
    """The normalised RGB and depth of the golden run."""
    parts = (dformer_normal(f"{prefix}{k}", batch, n, *size) for k, n in (("rgb", 3), ("depth", 1)))
    return jt.array(np.concatenate(list(parts), axis=1))


def check_logits(name: str, variant: str, monkeypatch: Any) -> None:
    """Stages, logits and classes of the whole network are the official ones."""
    golden, network = DFormerGolden(name).data, official(name, variant).eval()
    use_official_bases(monkeypatch)
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
