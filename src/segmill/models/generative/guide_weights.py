"""Values for a guide's network, once it is where it will run: from a file, or drawn.

Guides keep their network on the meta device until then, so that a large one is neither built in
host memory nor copied whole to a GPU that keeps a part of it.
"""

from pathlib import Path

import torch
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import RUN_WEIGHTS, choose_rules, load_arrays
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.sharded import Arrays, Draws, fill
from segmill.errors import SegmillError
from segmill.models.generative.codec import RANDOM, Codec
from segmill.models.generative.transformer import CODEC


def guide_file(weights: str) -> Path:
    """The file that `weights` names: a run folder's or itself. Raises SegmillError if not there."""
    path = Path(weights) / RUN_WEIGHTS if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise SegmillError(
            f"The guide's weights are missing: {path} does not exist (seen from {Path.cwd()}). "
            "Train a guide (segmill train experiment=guide_camvid) and give its run folder, or "
            "download one: REPA's last.pt from github.com/sihyun-yu/REPA, SiT-XL-2-256x256.pt "
            "from github.com/willisma/SiT, DiT-XL-2-256x256.pt from "
            "github.com/facebookresearch/DiT. Set model.generative.weights=FILE; random draws "
            "values, which is good for measuring speed only."
        )
    return path


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
