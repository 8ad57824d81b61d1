"""Write what `torch.save` writes since 1.6, without torch: torch.load(weights_only=True) reads it.

A zip of stored entries: `data.pkl` is a dictionary of tensors (pickle protocol 2), `data/KEY` the
bytes of the storage of one tensor, which start at a multiple of 64 so that the file can be mapped.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.allowed import STORAGES
from segmill.checkpoint.storage import CheckpointError, raw_bytes
from segmill.files import whole_file

Array = Shaped[np.ndarray, "..."]
KINDS = {
    element.dtype.newbyteorder("="): name.removeprefix("torch.")
    for name, element in STORAGES.items()
    if name.startswith("torch.") and "Untyped" not in name and not element.widened
}
STEM, ALIGNMENT = "archive", 64
LOCAL_HEADER, PADDING_HEADER, ZIP64_FIELD, ZIP64_FROM = 30, 4, 20, 1 << 30
# Pickle protocol 2, one opcode a name; nothing is memoised because nothing repeats but globals.
PROTOCOL, EMPTY_DICT, MARK, SET_ITEMS, STOP = b"\x80\x02", b"}", b"(", b"u", b"."
GLOBAL, REDUCE, TUPLE, EMPTY_TUPLE, PERSISTENT, FALSE = b"c", b"R", b"t", b")", b"Q", b"\x89"
REBUILD, ORDERED = ("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")


def write_torch(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write {name: array} as a state dict on the CPU, whole or not at all."""
    tensors = [_text(name) + _tensor(str(key), name, arrays[name]) for key, name in _keyed(arrays)]
    program = PROTOCOL + EMPTY_DICT + MARK + b"".join(tensors) + SET_ITEMS + STOP
    with whole_file(path) as scratch, zipfile.ZipFile(scratch, "w") as archive:
        _store(archive, "data.pkl", program)
        _store(archive, "byteorder", b"little")
        for key, name in _keyed(arrays):
            _store(archive, f"data/{key}", raw_bytes(arrays[name]))
        _store(archive, "version", b"3\n")


def _keyed(arrays: Mapping[str, Array]) -> list[tuple[int, str]]:
    return list(enumerate(arrays))


def _store(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """One stored entry whose bytes start aligned: the header has a field of the missing length."""
    entry = zipfile.ZipInfo(f"{STEM}/{name}")  # dated 1980: the same arrays give the same file
    large = len(content) > ZIP64_FROM
    assert archive.fp is not None
    start = archive.fp.tell() + LOCAL_HEADER + len(entry.filename) + PADDING_HEADER
    padding = -(start + ZIP64_FIELD * large) % ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    entry.file_size = len(content)
    with archive.open(entry, "w", force_zip64=large) as file:
        file.write(content)


def _tensor(key: str, name: str, array: Array) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, contiguous."""
    native = array.dtype.newbyteorder("=")
    if native not in KINDS:
        raise CheckpointError(
            f"{name!r} is {native}, which a torch file cannot hold; it can hold "
            f"{', '.join(sorted(str(each) for each in KINDS))}."
        )
    identity = (_text("storage"), _global("torch", KINDS[native]), _text(key), _text("cpu"))
    storage = _tuple(*identity, _integer(array.size)) + PERSISTENT
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    sizes = (_tuple(*map(_integer, array.shape)), _tuple(*map(_integer, strides)))
    hooks = _global(*ORDERED) + EMPTY_TUPLE + REDUCE
    return _global(*REBUILD) + _tuple(storage, _integer(0), *sizes, FALSE, hooks) + REDUCE


def _tuple(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def _global(module: str, name: str) -> bytes:
    return GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
