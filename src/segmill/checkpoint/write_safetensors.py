"""Write .safetensors from numpy arrays, one after the other, without the safetensors package.

The layout (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, the header as
JSON, then the arrays, little-endian and without gaps. Wider elements come first, so that each one
is aligned when the file is mapped.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.named_arrays import SAFETENSORS
from segmill.checkpoint.storage import CheckpointError, raw_bytes
from segmill.files import whole_file

Array = Shaped[np.ndarray, "..."]
CODES = {e.dtype.newbyteorder("="): code for code, e in SAFETENSORS.items() if not e.widened}
ALIGNMENT = 8


def write_safetensors(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write {name: array}, whole or not at all."""
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in ordered:
        array = arrays[name]
        code, end = _code(name, array), start + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with whole_file(path) as scratch, scratch.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            file.write(raw_bytes(arrays[name]))


def _code(name: str, array: Array) -> str:
    native = array.dtype.newbyteorder("=")
    if native not in CODES:
        raise CheckpointError(
            f"{name!r} is {native}, which safetensors cannot hold; it can hold "
            f"{', '.join(sorted(str(each) for each in CODES))}."
        )
    return CODES[native]
