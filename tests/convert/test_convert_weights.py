"""Weights in other formats: each writer against the golden arrays, and what is refused."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from golden import FOLDER
from segmill.checkpoint.read import CheckpointError, read_any, read_checkpoint
from segmill.checkpoint.storage import map_file
from segmill.checkpoint.torch_zip import stored_entries
from segmill.checkpoint.training_state import TrainingState, write_training_state
from segmill.checkpoint.write_safetensors import write_safetensors
from segmill.checkpoint.write_torch import ALIGNMENT, write_torch
from segmill.convert.weights import SUFFIXES, check_out, out_file, read_weights, write_weights

CHECKPOINTS = FOLDER / "checkpoints"
TRUTH = dict(np.load(CHECKPOINTS / "ref.npz"))


@pytest.mark.parametrize("kind", SUFFIXES)
@pytest.mark.parametrize("file", ["sd_zip.pth", "sd_legacy.pth", "sd.safetensors", "j.pkl"])
def test_names_types_and_values_survive(file: str, kind: str, tmp_path: Path) -> None:
    weights = read_weights(CHECKPOINTS / file)
    write_weights(tmp_path / "out", weights.arrays, kind, {})
    arrays = read_checkpoint(tmp_path / "out")
    assert arrays.keys() == weights.arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, weights.arrays[name], strict=True)


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_opens_the_file_without_trusting_it(mapped: bool, tmp_path: Path) -> None:
    write_torch(tmp_path / "w.pth", TRUTH)
    state = torch.load(tmp_path / "w.pth", weights_only=True, mmap=mapped)
    assert list(state) == list(TRUTH)
    for name, value in state.items():
        np.testing.assert_array_equal(value.numpy(), TRUTH[name], strict=True)


def test_arrays_start_aligned_in_a_torch_file(tmp_path: Path) -> None:
    write_torch(tmp_path / "w.pth", TRUTH)
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        entries = stored_entries(map_file(tmp_path / "w.pth"), archive)
    assert {entry.start % ALIGNMENT for entry in entries.values()} == {0}


def test_the_library_of_safetensors_opens_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", TRUTH, {"origin": "test"})
    state = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    assert state.keys() == TRUTH.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(value, TRUTH[name], strict=True)
    with safetensors.safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata() == {"origin": "test"}


def test_the_same_arrays_give_the_same_file(tmp_path: Path) -> None:
    for kind in SUFFIXES:
        for name in ("a", "b"):
            write_weights(tmp_path / name, TRUTH, kind, {})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("file", "widened"),
    [
        ("one_bf16.pth", True),
        ("oneleg_bf16.pth", True),
        ("sd.safetensors", True),
        ("one_w.pth", False),
        ("j.pkl", False),
    ],
)
def test_bfloat16_is_noticed(file: str, widened: bool) -> None:
    assert read_weights(CHECKPOINTS / file).bfloat16 == widened


def test_what_a_conversion_leaves_out_is_known() -> None:
    tree = read_any(CHECKPOINTS / "tar_zip.pth.tar")
    beside = read_weights(CHECKPOINTS / "tar_zip.pth.tar").beside
    assert set(beside) < set(tree)
    assert beside


def test_an_element_type_that_a_format_lacks_is_named(tmp_path: Path) -> None:
    wide = {"w": np.zeros(2, np.complex128)}
    with pytest.raises(CheckpointError, match=r"'w' is complex128, which safetensors"):
        write_safetensors(tmp_path / "w", wide, {})
    with pytest.raises(CheckpointError, match=r"'w' is uint16, which a torch file"):
        write_torch(tmp_path / "w", {"w": np.zeros(2, np.uint16)})
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_the_disk_is_full(tmp_path: Path, monkeypatch) -> None:
    def full(array: np.ndarray) -> memoryview:
        raise OSError("No space left on device")

    monkeypatch.setattr("segmill.checkpoint.write_torch.raw_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_torch(tmp_path / "w.pth", TRUTH)
    assert not list(tmp_path.iterdir())


def test_the_new_file_lies_next_to_the_old_one() -> None:
    assert out_file(Path("a/DFormer_Tiny.pth.tar"), "jittor") == Path("a/DFormer_Tiny.pkl")
    assert out_file(Path("a/v1.5_model.pth"), "safetensors") == Path("a/v1.5_model.safetensors")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    source, out = tmp_path / "a.pth", tmp_path / "b.pth"
    source.touch()
    check_out(out, source, overwrite=False)
    out.touch()
    with pytest.raises(CheckpointError, match="overwrite=true"):
        check_out(out, source, overwrite=False)
    check_out(out, source, overwrite=True)
    with pytest.raises(CheckpointError, match="is the file that is read"):
        check_out(source, source, overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        check_out(tmp_path, source, overwrite=True)


def test_a_run_folder_stands_for_its_weights(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TRUTH, {"segmill": "0"})
    weights = read_weights(tmp_path)
    assert weights.metadata == {"segmill": "0"}
    assert weights.arrays.keys() == TRUTH.keys()


def test_of_a_training_state_of_either_runtime_the_weights_are_taken(tmp_path: Path) -> None:
    pair = {"w": np.ones((2, 2), np.float32)}
    state = TrainingState(
        weights=pair, exp_avg=pair, exp_avg_sq=pair, step=3, random={}, best=float("nan")
    )
    write_training_state(tmp_path / "last.pkl", state)
    weights = read_weights(tmp_path / "last.pkl")
    assert list(weights.arrays) == ["w"]
    assert "optimizer" in weights.beside
    torch.save(
        {
            "state_dict": {"model.network.w": torch.ones(2, 2)},
            "optimizer_states": [{}],
            "global_step": 3,
        },
        tmp_path / "last.ckpt",
    )
    weights = read_weights(tmp_path / "last.ckpt")
    assert list(weights.arrays) == ["model.network.w"], "names as in the file"
    assert set(weights.beside) == {"optimizer_states", "global_step"}
