"""Files that are nothing but named arrays: .safetensors and .npz."""

import io
import json
import zipfile
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.storage import BFLOAT16, CheckpointError, Element, decode, slice_of

Array = Shaped[np.ndarray, "..."]
SAFETENSORS = {
    "F64": Element(np.dtype("<f8")),
    "F32": Element(np.dtype("<f4")),
    "F16": Element(np.dtype("<f2")),
    "BF16": BFLOAT16,
    "I64": Element(np.dtype("<i8")),
    "I32": Element(np.dtype("<i4")),
    "I16": Element(np.dtype("<i2")),
    "I8": Element(np.dtype("<i1")),
    "U64": Element(np.dtype("<u8")),
    "U32": Element(np.dtype("<u4")),
    "U16": Element(np.dtype("<u2")),
    "U8": Element(np.dtype("<u1")),
    "BOOL": Element(np.dtype("?")),
    "C64": Element(np.dtype("<c8")),
}
LENGTH_SIZE = 8
# Deflate cannot shrink more than this; an entry that claims more is a bomb.
DEFLATE_LIMIT = 1100


def safetensors_header(data: memoryview) -> tuple[dict[str, Any], int]:
    """The JSON header and where the tensors start."""
    length = int.from_bytes(slice_of(data, 0, LENGTH_SIZE), "little")
    header = json.loads(bytes(slice_of(data, LENGTH_SIZE, length)))
    if not isinstance(header, dict):
        raise CheckpointError("has a safetensors header that is no dictionary: damaged.")
    return header, LENGTH_SIZE + length


def read_safetensors(data: memoryview) -> dict[str, Array]:
    """{name: array} on the mapped file."""
    header, start = safetensors_header(data)
    arrays, end = {}, start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS:
            raise CheckpointError(
                f"holds {name!r} as {entry['dtype']}, which is not read. Convert it to bfloat16."
            )
        element, shape = SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if first < 0 or last - first != prod(shape) * element.dtype.itemsize:
            raise CheckpointError(f"gives {name!r} {last - first} bytes for {shape}: damaged.")
        raw = slice_of(data, start + first, last - first)
        arrays[name] = decode(raw, element).reshape(shape)
        end = max(end, start + last)
    if end != len(data):
        raise CheckpointError(f"has {len(data)} bytes where its header says {end}: damaged.")
    return arrays


def read_npz(archive: zipfile.ZipFile) -> dict[str, Array]:
    """{name: array}; each entry's checksum is verified while it is read."""
    arrays = {}
    for info in archive.infolist():
        if info.file_size > DEFLATE_LIMIT * (info.compress_size + 1):
            raise CheckpointError(f"claims an impossible size for {info.filename!r}: damaged.")
        file = io.BytesIO(archive.read(info))
        arrays[info.filename.removesuffix(".npy")] = _read_npy(file, info.filename)
    return arrays


def _read_npy(file: io.BytesIO, name: str) -> Array:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise CheckpointError(f"holds Python objects in {name!r}, which are not read.")
    raw = file.getbuffer()[file.tell() :]
    if prod(shape) * dtype.itemsize != len(raw):
        raise CheckpointError(f"has {len(raw)} bytes in {name!r} for the shape {shape}: damaged.")
    return decode(raw, Element(dtype)).reshape(shape, order="F" if fortran else "C")
