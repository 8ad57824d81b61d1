"""A checkpoint of any origin, written as safetensors, as torch's .pth or as Jittor's .pkl.

Only weights are written: names and element types as in the file, except for bfloat16, which numpy
lacks and which becomes float32 exactly.
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.named_arrays import safetensors_header
from segmill.checkpoint.read import CheckpointError, find_weights, read_any, read_metadata
from segmill.checkpoint.storage import map_file
from segmill.checkpoint.torch_zip import is_program
from segmill.checkpoint.write_jittor import write_jittor
from segmill.checkpoint.write_safetensors import write_safetensors
from segmill.checkpoint.write_torch import write_torch

Array = Shaped[np.ndarray, "..."]
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pth", "jittor": ".pkl"}
KNOWN_SUFFIXES = (".pth.tar", ".tar", ".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".npz")
RUN_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """What is in a file. `beside` is what a conversion leaves out: optimizer, epoch, ..."""

    path: Path
    arrays: Mapping[str, Array]
    beside: tuple[str, ...]
    metadata: Mapping[str, str]
    bfloat16: bool


def read_weights(path: Path) -> Weights:
    """Read a file, or the weights of a run folder; raise CheckpointError before anything else."""
    if (path / RUN_WEIGHTS).is_file():
        path = path / RUN_WEIGHTS
    tree = read_any(path)
    arrays, wrappers = find_weights(tree, path)
    beside = tuple(str(key) for key in tree if wrappers and key != wrappers[0])
    return Weights(path, arrays, beside, read_metadata(path), _has_bfloat16(path))


def out_file(path: Path, kind: str) -> Path:
    """Next to `path`, with the suffix of the new format."""
    suffix = next((each for each in KNOWN_SUFFIXES if path.name.endswith(each)), path.suffix)
    return path.with_name(path.name.removesuffix(suffix) + SUFFIXES[kind])


def check_out(out: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a folder, the file itself, and a file that is there, unless `overwrite`."""
    if out.is_dir():
        raise CheckpointError(f"out={out} is a folder. Name a file: out={out / source.name}")
    if out.exists() and out.samefile(source):
        raise CheckpointError(f"out={out} is the file that is read. Name another: out=FILE.")
    if out.exists() and not overwrite:
        raise CheckpointError(
            f"{out} exists already. Name another file with out=FILE, or replace it with "
            "overwrite=true."
        )


def write_weights(
    out: Path, arrays: Mapping[str, Array], kind: str, metadata: Mapping[str, str]
) -> None:
    """Write `arrays`, whole or not at all. Only safetensors have room for `metadata`."""
    if kind == "safetensors":
        write_safetensors(out, arrays, metadata)
    elif kind == "torch":
        write_torch(out, arrays)
    else:
        write_jittor(out, arrays)


def _has_bfloat16(path: Path) -> bool:
    """Whether some element type in the file is bfloat16, which the reader widens."""
    data = map_file(path)
    start = bytes(data[:9])
    if start[8:] == b"{":
        header = safetensors_header(data)[0]
        return any(entry.get("dtype") == "BF16" for entry in header.values())
    if start.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            programs = [name for name in archive.namelist() if is_program(name)]
            return any(b"BFloat16Storage" in archive.read(name) for name in programs)
    return b"BFloat16Storage" in bytes(data[: 1 << 24])
