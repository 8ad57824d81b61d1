"""Bytes of a checkpoint: the mapped file, element types, and strided views of storages."""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Shaped, UInt16

from segmill.errors import SegmillError


class CheckpointError(SegmillError):
    """A checkpoint that cannot be read or does not fit; the only exception a bad file raises."""


def map_file(path: Path) -> memoryview:
    """The file's bytes without reading them. Writing to them changes a private copy only."""
    with path.open("rb") as file:
        # Copy-on-write rather than read-only: torch warns about arrays that it may not write to.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


@dataclass(frozen=True)
class Element:
    """What one element of a storage is on disk. `widened`: bfloat16, which numpy lacks."""

    dtype: np.dtype
    widened: bool = False


BFLOAT16 = Element(np.dtype("<u2"), widened=True)


@dataclass(frozen=True)
class Storage:
    """One flat run of elements; tensors that share it become arrays that share its memory."""

    data: memoryview
    element: Element

    @cached_property
    def values(self) -> Shaped[np.ndarray, " N"]:
        """The elements in native byte order, aligned; bfloat16 as float32."""
        return decode(self.data, self.element)

    def view(
        self, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Shaped[np.ndarray, "..."]:
        """The tensor that starts at element `offset`."""
        return strided_view(self.values, offset, size, stride)


class UnreadStorage:
    """Stands for a storage whose place in the file is not known yet (first pass, legacy files)."""

    def view(
        self, offset: int, size: Sequence[int], stride: Sequence[int]
    ) -> Shaped[np.ndarray, "..."]:
        """Nothing: the first pass only asks which storages there are."""
        del offset, size, stride
        return np.empty(0)


def decode(data: memoryview, element: Element) -> Shaped[np.ndarray, " N"]:
    """`data` as a flat array that shares its memory where dtype and alignment permit."""
    if not len(data):
        return np.empty(0, np.float32 if element.widened else element.dtype.newbyteorder("="))
    raw = np.frombuffer(data, element.dtype)
    if element.widened:
        return widen_bfloat16(raw.astype(np.uint16, copy=False))
    native = raw.astype(element.dtype.newbyteorder("="), copy=False)
    return native if native.flags.aligned and native.flags.writeable else native.copy()


def raw_bytes(array: Shaped[np.ndarray, "..."]) -> memoryview:
    """The elements in C order, little-endian, as files of weights hold them."""
    plain = np.asarray(array, array.dtype.newbyteorder("<"), order="C").reshape(-1)
    return plain.view(np.uint8).data if plain.size else memoryview(b"")


def widen_bfloat16(raw: UInt16[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """bfloat16 is the upper half of a float32: exact."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def strided_view(
    values: Shaped[np.ndarray, " N"], offset: int, size: Sequence[int], stride: Sequence[int]
) -> Shaped[np.ndarray, "..."]:
    """The tensor (offset, size, stride), all counted in elements, on a flat array."""
    offset, extents, steps = index(offset), [index(n) for n in size], [index(n) for n in stride]
    if len(extents) != len(steps) or min((offset, *extents, *steps)) < 0:
        raise CheckpointError(f"holds a tensor of size {extents} with strides {steps}: damaged.")
    if 0 in extents:
        return np.empty(extents, values.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(extents, steps, strict=True))
    if last >= len(values):
        raise CheckpointError(
            f"holds a tensor that reaches element {last} of a storage of {len(values)}: damaged."
        )
    width = values.dtype.itemsize
    return np.ndarray(
        extents, values.dtype, values, offset * width, [step * width for step in steps]
    )


def slice_of(data: memoryview, start: int, length: int) -> memoryview:
    """`data[start:start + length]`, all of it there."""
    if min(start, length) < 0 or start + length > len(data):
        raise CheckpointError(
            f"needs bytes {start} to {start + length} but has {len(data)}: cut short or damaged. "
            "Download or copy it again."
        )
    return data[start : start + length]
