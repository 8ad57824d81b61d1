"""What class-conditional guides share: sizes that fit together, and values for the network.

A network that gets its values from a file waits on the meta device until it is where it will run,
so that a large one is never copied whole to a GPU that keeps a part of it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segmill.checkpoint.choose import RUN_WEIGHTS
from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.sharded import Arrays, Draws, fill
from segmill.errors import SegmillError
from segmill.models.generative.codec import RANDOM, Codec, codec_file
from segmill.models.generative.transformer import CODEC, DiffusionTransformer
from segmill.models.guide_view import GuideView


def check_sizes(network: DiffusionTransformer, codec: Codec, view: GuideView) -> None:
    """Refuse a network, a codec and a view that do not fit together."""
    if network.in_channels != codec.channels:
        raise SegmillError(
            f"The guide's network takes {network.in_channels} latent channels and its codec makes "
            f"{codec.channels}. Set network.in_channels={codec.channels}."
        )
    patch = codec.cell * network.patch
    if view.multiple % patch:
        raise SegmillError(
            f"view.multiple={view.multiple} is no multiple of {patch}, the pixels of a patch (a "
            f"latent cell has {codec.cell}, a patch {network.patch} cells). Set view.multiple and "
            "view.short to multiples of it."
        )


def guide_file(weights: str) -> Path:
    """The file that `weights` names: a run folder's or itself. Raises SegmillError if not there."""
    path = Path(weights) / RUN_WEIGHTS if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise SegmillError(
            f"The guide's weights are missing: {path} does not exist (seen from {Path.cwd()}). "
            "For ImageNet's classes download one: REPA's last.pt from github.com/sihyun-yu/REPA, "
            "SiT-XL-2-256x256.pt from github.com/willisma/SiT, DiT-XL-2-256x256.pt from "
            "github.com/facebookresearch/DiT. For other classes train one, as segmill train "
            "experiment=guide_camvid and experiment=digits_guide do. Set model.generative.weights "
            "to the file or run folder; random draws values, which is good for measuring speed "
            "only."
        )
    return path


def waiting(network: DiffusionTransformer, weights: str | None) -> DiffusionTransformer:
    """Without memory if it gets its values later; refused at once if their file is missing."""
    if weights is None:
        return network
    if weights != RANDOM:
        guide_file(weights)
    return network.to("meta")


def fill_guide(network: nn.Module, codec: Codec, weights: str, device: torch.device) -> None:
    """Give the network memory on `device` and values; it may be sharded already.

    A file of a guide that was trained here holds the codec that it was trained with too.
    """
    if weights == RANDOM:
        fill(network, Draws(), device)
        return
    arrays = read_checkpoint(guide_file(weights))
    _, rules = choose_rules(network, arrays)
    fill(network, Arrays(apply_rules(arrays, rules)), device)
    own = {n.removeprefix(CODEC): each for n, each in arrays.items() if n.startswith(CODEC)}
    if own:
        assert isinstance(codec, nn.Module)
        load_arrays(codec, own)


def missing_files(weights: str | None, codec: Mapping[str, Any]) -> list[str]:
    """One paragraph for each file of a class-conditional guide that is not there."""
    found: list[str] = []
    if weights is None:
        found.append(
            "model.generative.weights=null is for training a guide from scratch; one without "
            "weights knows no class. Set it to a file or to the run folder of a guide."
        )
    named = codec.get("weights")
    of_codec = partial(codec_file, key="model.generative.codec.weights")
    for look, file in ((guide_file, weights), (of_codec, named)):
        if file is None or file == RANDOM:
            continue
        try:
            look(file)
        except SegmillError as error:
            found.append(str(error))
    return found
