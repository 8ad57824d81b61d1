"""torch.save before 1.6: pickles one behind the other, then every storage's raw bytes."""

from typing import Any

from segmill.checkpoint.allowed import STORAGES
from segmill.checkpoint.storage import (
    CheckpointError,
    Element,
    Storage,
    UnreadStorage,
    slice_of,
)
from segmill.checkpoint.torch_zip import in_order, storage_identity
from segmill.checkpoint.unpickle import Unpickler, no_storages

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
# PROTO 2, LONG1 of ten bytes: the magic number as every legacy file starts.
FIRST_BYTES = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")
COUNT_SIZE = 8


def read_torch_legacy(data: memoryview) -> Any:
    """The object that was saved, its tensors as arrays. CUDA tensors come to the CPU.

    The file says what lies in a storage only inside the pickle that uses it, and where it lies
    only behind that pickle; so the pickle runs twice, first to learn which storages there are.
    """
    position, header = 0, []
    for _ in range(3):
        part, position = _load(data, position)
        header.append(part)
    _magic, protocol, system = header
    if protocol != PROTOCOL:
        raise CheckpointError(f"has the legacy protocol {protocol!r}, not {PROTOCOL}: damaged.")
    order = "=" if system["little_endian"] else "big"

    elements: dict[str, Element] = {}
    counts: dict[str, int] = {}

    def note_storage(identity: tuple[Any, ...]) -> UnreadStorage:
        kind, key, count = storage_identity(identity)
        elements[key], counts[key] = in_order(STORAGES[kind.name], order), count
        return UnreadStorage()

    unpickler = Unpickler(data, position, note_storage)
    unpickler.load()
    keys, behind = _load(data, unpickler.position)
    storages = _storages(data, behind, keys, elements, counts)

    def load_storage(identity: tuple[Any, ...]) -> Storage:
        _kind, key, _count = storage_identity(identity)
        return _part(storages[key], identity[5] if len(identity) > 5 else None)

    return Unpickler(data, position, load_storage).load()


def _load(data: memoryview, position: int) -> tuple[Any, int]:
    unpickler = Unpickler(data, position, no_storages)
    return unpickler.load(), unpickler.position


def _storages(
    data: memoryview,
    position: int,
    keys: list[str],
    elements: dict[str, Element],
    counts: dict[str, int],
) -> dict[str, Storage]:
    storages = {}
    for key in keys:
        count = int.from_bytes(slice_of(data, position, COUNT_SIZE), "little", signed=True)
        if count != counts[key]:
            raise CheckpointError(f"announces {counts[key]} elements and holds {count}: damaged.")
        length = count * elements[key].dtype.itemsize
        storages[key] = Storage(slice_of(data, position + COUNT_SIZE, length), elements[key])
        position += COUNT_SIZE + length
    return storages


def _part(storage: Storage, view: tuple[Any, ...] | None) -> Storage:
    """The very first versions could name a part of a storage: (key, offset, count)."""
    if view is None:
        return storage
    _key, offset, count = view
    width = storage.element.dtype.itemsize
    return Storage(slice_of(storage.data, offset * width, count * width), storage.element)
