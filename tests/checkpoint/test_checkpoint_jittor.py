"""Files for Jittor users: the standard library and our reader read them alike."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from golden import FOLDER
from segmill.checkpoint.read import read_checkpoint
from segmill.checkpoint.write_jittor import write_jittor


class WithoutJittor(pickle.Unpickler):
    """Jittor's loader but for the variable, which is here the array it is called with."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("jittor", "jittor_core.Var"):
            return lambda array: array
        return super().find_class(module, name)


TRUTH = dict(np.load(FOLDER / "checkpoints" / "ref.npz"))


def test_written_files_read_back(tmp_path: Path) -> None:
    write_jittor(tmp_path / "w.pkl", TRUTH)
    arrays = read_checkpoint(tmp_path / "w.pkl")
    assert list(arrays) == list(TRUTH)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, TRUTH[name], strict=True)


@pytest.mark.filterwarnings("ignore:numpy.core")
def test_written_files_are_ordinary_pickles(tmp_path: Path) -> None:
    write_jittor(tmp_path / "w.pkl", TRUTH)
    content = (tmp_path / "w.pkl").read_bytes()
    tree = WithoutJittor(io.BytesIO(content)).load()
    for name, array in tree.items():
        np.testing.assert_array_equal(array, TRUTH[name], strict=True)
    assert content.endswith((FOLDER / "checkpoints" / "j.pkl").read_bytes()[-8:])
