"""Files as torch and the libraries around it write them; the saved object is the truth."""

import argparse
import collections
import datetime
import pathlib
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from segmill.checkpoint import torch_zip
from segmill.checkpoint.allowed import Global, Inert
from segmill.checkpoint.read import CheckpointError, read_any, read_checkpoint, read_metadata

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(tree: Any, path: Path, *, zipped: bool = True) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(120.0).reshape(2, 3, 4, 5)
    return {
        "base": base,
        "permuted": base.permute(3, 1, 0, 2),
        "strided": base[:, ::2, 1:3, ::3],
        "expanded": base[:1, :1, :1, :1].expand(7, 3, 2, 2),
        "diagonal": base[0, 0].diagonal(),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "empty_view": base[:, 3:],
        "scalar_view": base[1, 2, 3, 4],
        "bfloat16_view": base.bfloat16()[1, :, 2],
        "half": base.half()[0, 0].T,
        "complex64": torch.view_as_complex(base.reshape(60, 2).clone()),
        "complex128": torch.tensor([1 + 2j], dtype=torch.complex128),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "int16": torch.arange(-3, 3, dtype=torch.int16)[::2],
        "negative": torch.tensor([-(2**40)]),
        "bool": torch.tensor([[True, False], [False, True]]).T,
    }


@FORMATS
def test_every_view_and_dtype_is_what_torch_says(zipped: bool, tmp_path: Path) -> None:
    tensors = views()
    arrays = read_checkpoint(saved(tensors, tmp_path / "v.pth", zipped=zipped))
    for name, tensor in tensors.items():
        truth = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        np.testing.assert_array_equal(arrays[name], truth, strict=True)


@FORMATS
def test_tensors_that_share_memory_share_it_here(zipped: bool, tmp_path: Path) -> None:
    tied = torch.ones(4, 4)
    path = saved({"a": tied, "b": tied, "c": tied[1:3]}, tmp_path / "t.pth", zipped=zipped)
    arrays = read_checkpoint(path)
    assert np.shares_memory(arrays["a"], arrays["b"])
    assert np.shares_memory(arrays["a"], arrays["c"])


def test_dtypes_that_only_new_files_have(tmp_path: Path) -> None:
    tensors = {"u16": torch.ones(5, dtype=torch.uint16), "u32": torch.ones(2, dtype=torch.uint32)}
    arrays = read_checkpoint(saved(tensors, tmp_path / "u.pth"))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), strict=True)


def test_a_lazily_conjugated_tensor_is_refused(tmp_path: Path) -> None:
    path = saved({"w": torch.tensor([1 + 2j]).conj()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"lazy tensor.*clone"):
        read_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved({"w": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path)["w"].sum() == 3


def test_a_big_file_is_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "CHECK_UP_TO", 1 << 20)
    path = saved({"w": torch.zeros(1 << 20)}, tmp_path / "w.pth")
    monkeypatch.setattr(torch_zip.zlib, "crc32", lambda _: pytest.fail("read the whole file"))
    array = read_checkpoint(path)["w"]
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    assert isinstance(owner, memoryview)  # of the mapped file


def test_a_big_endian_file_is_turned_around(tmp_path: Path) -> None:
    saved({"w": torch.tensor([1.5, -2.0])}, tmp_path / "w.pth")
    little, big = np.array([1.5, -2.0], "<f4"), np.array([1.5, -2.0], ">f4")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "big.pth", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name).replace(little.tobytes(), big.tobytes())
            target.writestr(name, b"big" if name.endswith("byteorder") else content)
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "big.pth")["w"], little, strict=True)


WEIGHTS = {"backbone.w": torch.ones(2), "head.b": torch.zeros(3)}


@pytest.mark.parametrize(
    "tree",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"model": WEIGHTS, "epoch": 3},
        {"model": {"state_dict": WEIGHTS}},
        {"model": "resnet50", "state_dict": WEIGHTS},
        {"model": {"w": torch.ones(1)}, "model_ema": WEIGHTS},
        {"state_dict": {"w": torch.ones(1)}, "state_dict_ema": WEIGHTS, "arch": "x"},
        {"teacher": WEIGHTS, "epoch": 3},
        {**WEIGHTS, "epoch": 3},
    ],
)
@FORMATS
def test_the_weights_are_found_in_their_wrapper(tree: Any, zipped: bool, tmp_path: Path) -> None:
    arrays = read_checkpoint(saved(tree, tmp_path / "w.pth", zipped=zipped))
    assert {name: array.shape for name, array in arrays.items()} == {
        "backbone.w": (2,),
        "head.b": (3,),
    }


def test_prefixes_stay_as_in_the_file(tmp_path: Path) -> None:
    path = saved({"state_dict": {"module.w": torch.ones(2)}}, tmp_path / "w.pth")
    assert list(read_checkpoint(path)) == ["module.w"]


@FORMATS
def test_what_training_scripts_save_beside_the_weights(zipped: bool, tmp_path: Path) -> None:
    tree = {
        "state_dict": collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2))),
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("a"), when=datetime.date(2024, 1, 2)),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.float16,
        "meta": collections.defaultdict(list, {"a": [1]}),
        "best": np.float64(0.5),
        "counts": np.arange(3),
        "names": {"x", "y"},
        "queue": collections.deque([1, 2], maxlen=3),
        "hyper_parameters": OmegaConf.create({"a": [1, {"b": "x"}], "n": None}),
        "time": datetime.datetime(2024, 1, 2, 3, 4),
        "nested": [(1, 2.5, None, True, "s", b"bytes", 2**70)],
        "rng": {"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()},
    }
    result = read_any(saved(tree, tmp_path / "w.pth", zipped=zipped))
    assert result["size"] == (2, 3)
    assert result["device"] == "cuda:1"
    assert result["dtype"] == Global("torch.float16")
    assert result["meta"] == {"a": [1]}
    assert result["best"] == 0.5
    assert result["counts"].tolist() == [0, 1, 2]
    assert result["names"] == {"x", "y"}
    assert result["queue"] == [1, 2]
    assert result["nested"] == tree["nested"]
    assert isinstance(result["time"], Inert)
    assert result["hyper_parameters"].name == "omegaconf.dictconfig.DictConfig"
    assert result["args"].state["lr"] == 0.1
    assert result["args"].state["path"].name.startswith("pathlib.")
    np.testing.assert_array_equal(result["rng"]["numpy"][1], tree["rng"]["numpy"][1])
    np.testing.assert_array_equal(result["rng"]["torch"], tree["rng"]["torch"].numpy())


@pytest.mark.parametrize("protocol", [2, 4])
def test_mmengine_files_are_read_without_mmengine(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HistoryBuffer:
        """As mmengine's: its state holds an array and its own methods."""

        def __init__(self) -> None:
            self.log_history = np.array([0.5])
            self.methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return 0.0

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.min.__module__ = module.__name__
    HistoryBuffer.min.__qualname__ = "HistoryBuffer.min"
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    tree = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("a",), "palette": [[1, 2, 3]]}},
        "state_dict": {"backbone.w": torch.ones(2)},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {}},
        "param_schedulers": [{"last_step": np.int64(4)}],
    }
    torch.save(tree, tmp_path / "mm.pth", pickle_protocol=protocol)
    assert list(read_checkpoint(tmp_path / "mm.pth")) == ["backbone.w"]
    buffer = read_any(tmp_path / "mm.pth")["message_hub"]["log_scalars"]["train/loss"]
    assert buffer.state["log_history"].tolist() == [0.5]
    assert buffer.state["methods"]["min"].name == f"{module.__name__}.HistoryBuffer.min"


def test_a_plain_pickle_of_arrays_is_read(tmp_path: Path) -> None:
    tree = {"model": {"w": np.arange(6.0).reshape(2, 3).T, "big": np.arange(5000)}, "author": "x"}
    for protocol in (2, 4):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(tree, protocol))
        arrays = read_checkpoint(tmp_path / "w.pkl")
        np.testing.assert_array_equal(arrays["w"], tree["model"]["w"], strict=True)
        np.testing.assert_array_equal(arrays["big"], np.arange(5000), strict=True)


def test_a_pickle_that_python_2_wrote_is_read(tmp_path: Path) -> None:
    # {'w': numpy.array([1, 2], '<i2')} as Python 2.7 pickles it: bytes are strings there.
    (tmp_path / "w.pkl").write_bytes(
        b"\x80\x02}q\x00U\x01wcnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02"
        b"K\x00\x85U\x01b\x87Rq\x03(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\x02\x00tbs."
    )
    np.testing.assert_array_equal(
        read_checkpoint(tmp_path / "w.pkl")["w"], np.array([1, 2], np.int16), strict=True
    )


def test_metadata_of_safetensors_is_given(tmp_path: Path) -> None:
    save_file({"w": np.ones(2)}, tmp_path / "w.safetensors", {"segmill": "{}"})
    assert read_metadata(tmp_path / "w.safetensors") == {"segmill": "{}"}
    saved({"w": torch.ones(1)}, tmp_path / "w.pth")
    assert read_metadata(tmp_path / "w.pth") == {}


def test_a_safetensors_header_of_any_length_is_recognised(tmp_path: Path) -> None:
    # 0x80 as the first byte of the length looks like the start of a pickle.
    seen = set()
    for length in range(1, 400, 8):
        save_file({"w": np.ones(2)}, tmp_path / "w.safetensors", {"note": "x" * length})
        seen.add((tmp_path / "w.safetensors").read_bytes()[0])
        assert read_checkpoint(tmp_path / "w.safetensors")["w"].tolist() == [1, 1]
    assert 0x80 in seen
