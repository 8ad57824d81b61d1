"""Every golden checkpoint, against the arrays it was written from (ref.npz)."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from golden import FOLDER
from segmill.checkpoint.allowed import Inert
from segmill.checkpoint.read import read_any, read_checkpoint

CHECKPOINTS = FOLDER / "checkpoints"
TRUTH = np.load(CHECKPOINTS / "ref.npz")
TORCH_FILES = sorted(p.name for p in CHECKPOINTS.glob("*.pth*"))
ALL, SIMPLE = set(TRUTH.files), {"w", "b", "half", "i64", "scalar", "nbt"}
EXPECTED = {
    "f32": {"w", "b"},
    "simple": SIMPLE,
    "sd": ALL,
    "full": ALL,
    "tar": ALL,
}


def names_in(file: str) -> set[str]:
    stem = file.partition(".")[0]
    kind, _, rest = stem.partition("_")
    if kind in ("one", "oneleg"):
        return {"p"} if rest == "PARAM" else {rest}
    return EXPECTED[kind]


@pytest.mark.parametrize("file", TORCH_FILES)
def test_a_torch_file_gives_the_saved_arrays(file: str) -> None:
    arrays = read_checkpoint(CHECKPOINTS / file)
    assert set(arrays) == names_in(file)
    for name, array in arrays.items():
        truth = TRUTH["w" if name == "p" else name]
        assert array.dtype == truth.dtype
        np.testing.assert_array_equal(array, truth, strict=True)


def test_safetensors_give_the_saved_arrays() -> None:
    arrays = read_checkpoint(CHECKPOINTS / "sd.safetensors")
    assert set(arrays) == ALL - {"empty"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, TRUTH[name], strict=True)


def test_npz_gives_the_saved_arrays() -> None:
    arrays = read_checkpoint(CHECKPOINTS / "ref.npz")
    assert set(arrays) == ALL
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, TRUTH[name], strict=True)


class WithoutJittor(pickle.Unpickler):
    """The standard library's reading of the same bytes; a Var is the array it is called with."""

    def find_class(self, module: str, name: str) -> object:
        return (lambda array: array) if module == "jittor" else super().find_class(module, name)


@pytest.mark.filterwarnings("ignore:numpy.core")
@pytest.mark.parametrize("file", ["j.pkl", "j.jt"])
def test_jittor_files_give_their_arrays_without_jittor(file: str) -> None:
    path = CHECKPOINTS / file
    with path.open("rb") as stream:
        truth = WithoutJittor(stream).load()
    arrays = read_checkpoint(path)
    assert list(arrays) == ["weight", "bias"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, truth[name], strict=True)


def test_a_wrong_sha1_is_refused(tmp_path: Path) -> None:
    content = bytearray((CHECKPOINTS / "j.pkl").read_bytes())
    content[200] ^= 1
    (tmp_path / "j.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"j\.pkl has a wrong SHA-1"):
        read_checkpoint(tmp_path / "j.pkl")


@pytest.mark.parametrize("file", ["tar_zip.pth.tar", "tar_legacy.pth.tar"])
def test_the_averaged_weights_are_preferred_and_the_rest_stays_readable(file: str) -> None:
    tree = read_any(CHECKPOINTS / file)
    assert tree["epoch"] == 1
    assert tree["metric"] == 81.0
    assert isinstance(tree["args"], Inert)
    assert (tree["args"].name, tree["args"].state) == ("argparse.Namespace", {"lr": 0.1})
    assert read_checkpoint(CHECKPOINTS / file).keys() == tree["state_dict_ema"].keys()


def test_a_training_state_keeps_optimizer_and_step() -> None:
    tree = read_any(CHECKPOINTS / "full_zip.pth")
    assert (tree["epoch"], tree["iteration"]) == (3, 9)
    moments = tree["optimizer"]["state"][0]
    assert moments["exp_avg"].shape == (6, 8)
    assert tree["optimizer"]["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("file", ["sd_zip.pth", "sd_legacy.pth"])
def test_arrays_are_writable_and_aligned_so_that_torch_takes_them(file: str) -> None:
    for array in read_checkpoint(CHECKPOINTS / file).values():
        assert array.flags.writeable
        assert array.flags.aligned


def test_writing_to_an_array_never_changes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes((CHECKPOINTS / "one_w.pth").read_bytes())
    read_checkpoint(path)["w"][:] = 0
    np.testing.assert_array_equal(read_checkpoint(path)["w"], TRUTH["w"])


def test_the_extension_decides_nothing(tmp_path: Path) -> None:
    for file in ("one_w.pth", "oneleg_w.pth", "sd.safetensors", "ref.npz"):
        copy = tmp_path / "weights.txt"
        copy.write_bytes((CHECKPOINTS / file).read_bytes())
        np.testing.assert_array_equal(read_checkpoint(copy)["w"], TRUTH["w"])
