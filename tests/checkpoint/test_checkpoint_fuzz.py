"""Damaged files: anything but a result or a CheckpointError is a defect."""

import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from golden import FOLDER
from segmill.checkpoint import torch_zip
from segmill.checkpoint.read import CheckpointError, read_checkpoint

FILES = sorted(path.name for path in (FOLDER / "checkpoints").iterdir())
ZIPS = [f for f in FILES if (FOLDER / "checkpoints" / f).read_bytes()[:4] == b"PK\3\4"]
ROUNDS = 8


def damaged(content: bytes, draw: random.Random) -> Iterator[bytes]:
    for _ in range(ROUNDS):
        place, other = draw.randrange(len(content)), draw.randrange(len(content))
        flipped = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            flipped[draw.randrange(len(content))] = draw.choice((0, 255, 128, draw.randrange(256)))
        yield bytes(flipped)
        yield content[:place]
        yield content[:place] + draw.randbytes(9) + content[place:]
        yield content[:place] + content[other : other + 30] + content[place + 30 :]


@pytest.mark.parametrize(
    ("file", "checksums"), [*((f, True) for f in FILES), *((f, False) for f in ZIPS)]
)
def test_damage_gives_a_checkpoint_error_or_nothing_worse(
    file: str, checksums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not checksums:  # they hide the inner reader from the damage
        monkeypatch.setattr(torch_zip, "CHECK_UP_TO", 0)
    path = tmp_path / file
    content = (FOLDER / "checkpoints" / file).read_bytes()
    messages = []
    for variant in damaged(content, random.Random(file)):
        path.write_bytes(variant)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > ROUNDS  # every cut, at least
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "npz"])
def test_every_cut_is_refused(kind: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if kind == "safetensors":
        save_file({"w": np.arange(6.0), "b": np.ones(3)}, whole)
    elif kind == "npz":
        np.savez(whole, w=np.arange(6.0))
        whole = tmp_path / "whole.npz"
    else:
        state = {"w": torch.arange(6.0), "b": torch.ones(3)}
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for length in range(0, len(content), 13):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(cut)


def test_a_crafted_memo_index_allocates_nothing(tmp_path: Path) -> None:
    # LONG_BINPUT 0xFFFFFFFE: the standard unpickler would allocate 64 GiB for it.
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02}r\xfe\xff\xff\xff.")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "memo.pkl")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_deep_nesting_is_refused_without_a_crash(tmp_path: Path) -> None:
    deep = tmp_path / "deep.pkl"
    # A dictionary key of nested tuples: a million of them would overflow the C stack when hashed.
    deep.write_bytes(b"\x80\x02}" + b")" + b"\x85" * 1000 + b"Ns.")
    with pytest.raises(CheckpointError, match="dictionary key"):
        read_checkpoint(deep)
    deep.write_bytes(b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(deep)
    header = b'{"a":' * 100_000
    deep.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(deep)


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    # d = {}; d["model"] = d
    (tmp_path / "cycle.pkl").write_bytes(b"\x80\x02}q\x00U\x05modelh\x00s.")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "cycle.pkl")


def test_one_text_encoded_many_times_is_refused(tmp_path: Path) -> None:
    encode = b"c_codecs\nencode\nq\x01"
    text = b"X" + (1_000_000).to_bytes(4, "little") + b"a" * 1_000_000 + b"q\x00"
    repeat = b"h\x01h\x00\x85Ra" * 100_000
    (tmp_path / "bomb.pkl").write_bytes(b"\x80\x02" + text + encode + b"]" + repeat + b".")
    with pytest.raises(CheckpointError, match="unpacks to more bytes"):
        read_checkpoint(tmp_path / "bomb.pkl")


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    content = (FOLDER / "checkpoints" / "oneleg_w.pth").read_bytes()
    size = content.index(b"K\x06K\x08\x86")
    (tmp_path / "w.pth").write_bytes(content[:size] + b"K\x07K\x08\x86" + content[size + 5 :])
    with pytest.raises(CheckpointError, match="reaches element 55 of a storage of 48"):
        read_checkpoint(tmp_path / "w.pth")


def test_flipped_weights_in_a_zip_are_found_by_their_checksum(tmp_path: Path) -> None:
    content = bytearray((FOLDER / "checkpoints" / "one_w.pth").read_bytes())
    values = np.load(FOLDER / "checkpoints" / "ref.npz")["w"].tobytes()
    content[content.index(values) + 5] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum in 'one_w/data/0'"):
        read_checkpoint(tmp_path / "w.pth")
