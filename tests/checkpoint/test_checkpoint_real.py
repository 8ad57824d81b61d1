"""Real published files, against the libraries that wrote them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from segmill.checkpoint.allowed import Inert
from segmill.checkpoint.read import read_any, read_checkpoint

# name: (wrapper, number of arrays, values). The counts are those of the files' own READMEs.
TORCH_FILES = {
    "ExtremeC3.pth": (None, 405),
    "IAT_best_Epoch_lol_zip.pth": (None, 161),
    "SCI_easy_zip.pt": (None, 83),
    "cgcnn_band-gap.pth.tar": ("state_dict", 46),
    "cgcnn_semi-metal-classification.pth.tar": ("state_dict", 46),
    "espnet_p_2_q_8_camvid.pth": (None, 189),
}


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_real_file_gives_what_torch_gives(name: str, real_data: Path) -> None:
    path = real_data / "samples" / "weights" / name
    wrapper, count = TORCH_FILES[name]
    # The one file that torch refuses to read safely is known to be harmless.
    truth: Any = torch.load(path, map_location="cpu", weights_only="semi-metal" not in name)
    truth = truth if wrapper is None else truth[wrapper]
    arrays = read_checkpoint(path)
    assert len(arrays) == count
    assert list(arrays) == list(truth)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, truth[key].numpy(), strict=True)


def test_a_real_training_state_keeps_its_optimizer(real_data: Path) -> None:
    tree = read_any(real_data / "samples/weights/cgcnn_semi-metal-classification.pth.tar")
    assert set(tree["optimizer"]) == {"state", "param_groups"}
    assert isinstance(tree["epoch"], int)
    assert not isinstance(tree["best_mae_error"], Inert)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_real_bfloat16_safetensors_are_exact(part: str, real_data: Path) -> None:
    path = real_data / "samples" / "weights" / f"taesd3_{part}.safetensors"
    arrays = read_checkpoint(path)
    assert len(arrays) == 67
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(arrays)
        for key, array in arrays.items():
            truth = file.get_tensor(key).float().numpy()
            np.testing.assert_array_equal(array, truth, strict=True)
