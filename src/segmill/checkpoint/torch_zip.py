"""torch.save since 1.6: a zip of stored entries, `STEM/data.pkl` and `STEM/data/KEY`."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from segmill.checkpoint.allowed import STORAGES, Global
from segmill.checkpoint.storage import CheckpointError, Element, Storage, slice_of
from segmill.checkpoint.unpickle import Unpickler

LOCAL_HEADER = b"PK\3\4"
LOCAL_HEADER_SIZE = 30
# Checksums are compared in files that surely stay in the page cache, so that the later copy into
# the model does not read the disk a second time.
CHECK_UP_TO = 1 << 30


@dataclass(frozen=True)
class Entry:
    """Where an entry's bytes lie in the file, and their CRC-32 (0: not computed)."""

    start: int
    length: int
    checksum: int


def read_torch_zip(data: memoryview, archive: zipfile.ZipFile) -> Any:
    """The object that was saved, its tensors as arrays on the mapped file."""
    entries = stored_entries(data, archive)
    program = min((name for name in entries if is_program(name)), key=len)
    stem = program.removesuffix("data.pkl")
    if f"{stem}constants.pkl" in entries:
        raise CheckpointError(
            "is a TorchScript program, not a file of weights. Save its weights where torch is "
            "installed: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)."
        )
    check_checksums(data, entries)
    storages: dict[tuple[str, str], Storage] = {}
    order = "="
    if f"{stem}byteorder" in entries:
        order = bytes(content(data, entries, f"{stem}byteorder")).decode("ascii")

    def load_storage(identity: tuple[Any, ...]) -> Storage:
        kind, key, count = storage_identity(identity)
        if (kind.name, key) not in storages:
            element = in_order(STORAGES[kind.name], order)
            raw = content(data, entries, f"{stem}data/{key}")
            storages[kind.name, key] = Storage(
                slice_of(raw, 0, count * element.dtype.itemsize), element
            )
        return storages[kind.name, key]

    return Unpickler(content(data, entries, program), 0, load_storage).load()


def is_program(name: str) -> bool:
    """Whether the entry is the pickle of a torch archive."""
    return name == "data.pkl" or name.endswith("/data.pkl")


def stored_entries(data: memoryview, archive: zipfile.ZipFile) -> dict[str, Entry]:
    """Where each entry lies. torch stores; a compressed entry means somebody zipped again."""
    entries = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"has the compressed or encrypted entry {info.filename!r}, which torch.save never "
                "writes. Unpack it: the checkpoint is probably inside."
            )
        header = slice_of(data, info.header_offset, LOCAL_HEADER_SIZE)
        if header[:4] != LOCAL_HEADER:
            raise CheckpointError(f"has no entry {info.filename!r} where its index says: damaged.")
        skip = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = info.header_offset + LOCAL_HEADER_SIZE + skip
        slice_of(data, start, info.file_size)
        entries[info.filename] = Entry(start, info.file_size, info.CRC)
    return entries


def check_checksums(data: memoryview, entries: Mapping[str, Entry]) -> None:
    """Compare the CRC-32 of every entry, where torch computed one, in files up to 1 GiB."""
    if len(data) > CHECK_UP_TO:
        return
    for name, entry in entries.items():
        found = zlib.crc32(slice_of(data, entry.start, entry.length))
        if entry.checksum not in (0, found):
            raise CheckpointError(
                f"has a wrong checksum in {name!r}: damaged. Download or copy it again."
            )


def content(data: memoryview, entries: Mapping[str, Entry], name: str) -> memoryview:
    """The bytes of one entry."""
    if name not in entries:
        raise CheckpointError(f"lacks its entry {name!r}: damaged. Download or copy it again.")
    return slice_of(data, entries[name].start, entries[name].length)


def storage_identity(identity: tuple[Any, ...]) -> tuple[Global, str, int]:
    """Type, key and number of elements of ('storage', type, key, location, count)."""
    tag, kind, key, _location, count = identity[:5]
    named = isinstance(kind, Global) and kind.name in STORAGES and isinstance(key, str)
    if tag != "storage" or not named or not isinstance(count, int) or count < 0:
        raise CheckpointError(f"refers to an unknown storage ({identity!r:.80}): damaged.")
    return kind, key, count


def in_order(element: Element, order: str) -> Element:
    """The element as a machine of that byte order wrote it."""
    if order != "big":
        return element
    return Element(np.dtype(element.dtype).newbyteorder(">"), element.widened)
