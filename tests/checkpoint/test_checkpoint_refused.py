"""Files that are no checkpoint, and pickles that want something run."""

import collections
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint import torch_legacy
from segmill.checkpoint.read import CheckpointError, read_any, read_checkpoint, read_metadata


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\0" * 5000, "is no known checkpoint"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n  <html lang='en'>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00" + b"\0" * 90, "compressed by gzip"),
        (b"hello", "too few for a checkpoint"),
        (b"\x80\x02N.", "holds no weights: it is one NoneType"),
        (b"\x80\x02}.", "holds no weights: it has no entries"),
        (b"\x80\x02]q\x00.tail", "4 bytes behind its pickle"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


def test_an_absent_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_metadata(tmp_path / "none.safetensors")


def test_a_sharded_checkpoint_says_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        read_checkpoint(tmp_path)


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("weights.pth", b"inside")
    with pytest.raises(CheckpointError, match="zip file without a checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_rezipped_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(tmp_path / "again.pth")


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"`torch\.nn\.modules\.linear\.Linear`.*state_dict"):
        read_checkpoint(tmp_path / "module.pth")


def test_several_sets_of_weights_are_not_chosen_among(tmp_path: Path) -> None:
    torch.save({"G": {"w": torch.ones(1)}, "D": {"w": torch.ones(1)}}, tmp_path / "gan.pth")
    with pytest.raises(CheckpointError, match=r"several sets of weights.*'G' \(1 arrays\)"):
        read_checkpoint(tmp_path / "gan.pth")


def test_an_array_of_python_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", o=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match=r"Python objects in 'o\.npy'"):
        read_checkpoint(tmp_path / "o.npz")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


RUN = text("touch MARKER")
# What each step of the pickle machine could be made to call.
ATTACKS: dict[str, tuple[bytes, str]] = {
    "reduce": (b"cposix\nsystem\n" + RUN + b"\x85R.", "posix.system"),
    "reduce os": (b"cos\nsystem\n" + RUN + b"\x85R.", "os.system"),
    "stack global": (text("os") + text("system") + b"\x93" + RUN + b"\x85R.", "os.system"),
    "dotted": (text("torch") + text("os.system") + b"\x93" + RUN + b"\x85R.", "torch.os.system"),
    "instance": (b"(" + RUN + b"ios\nsystem\n.", "os.system"),
    "object": (b"(cos\nsystem\n" + RUN + b"o.", "os.system"),
    "new object": (b"csubprocess\nPopen\n" + RUN + b"\x85\x81.", "subprocess.Popen"),
    "new object ex": (b"csubprocess\nPopen\n" + RUN + b"\x85}\x92.", "subprocess.Popen"),
    "eval": (b"c__builtin__\neval\n" + RUN + b"\x85R.", "builtins.eval"),
    "exec": (b"cbuiltins\nexec\n" + RUN + b"\x85R.", "builtins.exec"),
    "import": (b"cbuiltins\n__import__\n" + text("os") + b"\x85R.", "builtins.__import__"),
    "getattr": (
        b"c__builtin__\ngetattr\n" + b"cargparse\nNamespace\n" + text("__init__") + b"\x86R.",
        "attribute '__init__' of argparse.Namespace",
    ),
    "subclass of a call": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN" + RUN + b"\x85NtR.",
        "posix.system",
    ),
    "call of what a call gave": (
        b"cfunctools\npartial\n" + RUN + b"\x85R)R.",
        "calls a Inert",
    ),
    "state of a global": (b"ctorch\nSize\n}b.", "state of a Global"),
    "nested load": (
        b"ctorch.storage\n_load_from_bytes\n" + RUN + b"\x85R.",
        "torch.storage._load_from_bytes",
    ),
    "numpy load": (b"cnumpy\nload\n" + RUN + b"\x85R.", "numpy.load"),
    "extension": (b"\x82\x01.", "EXT1"),
    "persistent": (b"cos\nsystem\nQ.", "os.system"),
    "a dill function": (b"cdill._dill\n_create_function\n)R.", "dill._dill._create_function"),
}


def as_pickle(program: bytes, path: Path) -> None:
    path.write_bytes(b"\x80\x04" + program)


def as_zip(program: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program)
        archive.writestr("archive/version", b"3\n")


def as_legacy(program: bytes, path: Path) -> None:
    parts = (torch_legacy.MAGIC, torch_legacy.PROTOCOL, {"little_endian": True})
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    path.write_bytes(head + b"\x80\x02" + program + pickle.dumps([], protocol=2))


@pytest.mark.parametrize("write", [as_pickle, as_zip, as_legacy])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_run(
    attack: str,
    write: Callable[[bytes, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, named = ATTACKS[attack]
    monkeypatch.chdir(tmp_path)
    write(program, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError) as error:
        read_any(tmp_path / "evil.pth")
    assert named in str(error.value)
    assert str(tmp_path / "evil.pth") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_an_inert_object_takes_any_state_and_does_nothing(tmp_path: Path) -> None:
    state = b"}" + text("__class__") + b"cbuiltins\nobject\n" + b"s" + text("x") + b"K\x01s"
    as_pickle(b"cargparse\nNamespace\n)R" + state + b"b.", tmp_path / "args.pkl")
    tree = read_any(tmp_path / "args.pkl")
    assert type(tree).__name__ == "Inert"
    assert tree.state["x"] == 1


def test_a_dictionary_subclass_is_a_plain_dictionary(tmp_path: Path) -> None:
    tree = {"a": collections.OrderedDict(x=1), "b": collections.Counter("aab")}
    torch.save(tree, tmp_path / "d.pth")
    assert read_any(tmp_path / "d.pth") == {"a": {"x": 1}, "b": {"a": 2, "b": 1}}
