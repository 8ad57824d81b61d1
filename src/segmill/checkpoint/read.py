"""Read the weights of any checkpoint as numpy arrays. Nothing in the file is ever executed.

The first bytes decide the format, never the extension. Arrays are views of the mapped file where
dtype and alignment permit, so a file much larger than the memory can be opened; keep the file in
place while they are used (files are replaced by renaming, which is safe, not rewritten).
"""

import hashlib
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.named_arrays import read_npz, read_safetensors, safetensors_header
from segmill.checkpoint.storage import CheckpointError, map_file
from segmill.checkpoint.torch_legacy import FIRST_BYTES as LEGACY
from segmill.checkpoint.torch_legacy import read_torch_legacy
from segmill.checkpoint.torch_zip import is_program, read_torch_zip
from segmill.checkpoint.unpickle import Unpickler, no_storages

__all__ = ["CheckpointError", "read_any", "read_checkpoint", "read_metadata"]

Array = Shaped[np.ndarray, "..."]
JITTOR_END = b"HCAJSLHD"
SHA1_SIZE = 20
# Where libraries keep the weights, the better set first: an average of the weights (EMA) is what
# timm, the official DFormer, and diffusion transformers (`ema`) evaluate.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "params_ema",
    "ema",
    "state_dict",
    "model",
    "module",
    "network",
    "net",
    "params",
    "weights",
)
# What the standard library and numpy raise on damaged bytes.
DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    BufferError,
    EOFError,
    OSError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    SystemError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
)


def read_checkpoint(path: str | Path) -> dict[str, Array]:
    """{name: array} of the weights: wrappers removed, names as in the file, bfloat16 as float32."""
    weights, _where = find_weights(read_any(path), path)
    return weights


def read_any(path: str | Path) -> Any:
    """The whole object tree (optimizer, epoch, ...) with numpy arrays and inert stand-ins."""
    path = Path(path)
    try:
        return _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error.__cause__
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read by this user ({error}).") from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({type(error).__name__}: {error!s:.200}). "
            "Download or copy it again."
        ) from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} for any other file."""
    path = Path(path)
    try:
        _refuse_non_files(path)
        data = map_file(path)
        header = safetensors_header(data)[0] if _is_safetensors(data) else {}
        return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error.__cause__
    except DAMAGED as error:
        raise CheckpointError(f"{path} has a damaged header ({error!s:.200}).") from error


def is_jittor(path: Path) -> bool:
    """Whether jt.save wrote the file."""
    return bytes(map_file(path)[-len(JITTOR_END) :]) == JITTOR_END


def find_weights(tree: Any, path: str | Path) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The weights inside `tree` and the wrappers around them, outermost first."""
    where: tuple[str, ...] = ()
    # Two wrappers occur ({"model": {"state_dict": ...}}); a cyclic tree must end as well.
    for _ in range(4):
        if not isinstance(tree, dict):
            break
        wrapper = next((name for name in WRAPPERS if isinstance(tree.get(name), dict)), None)
        arrays = {name: value for name, value in tree.items() if _is_weight(name, value)}
        if wrapper is None and arrays:
            return arrays, where
        sets = [name for name, value in tree.items() if _weight_count(value)]
        if wrapper is None and len(sets) > 1:
            raise CheckpointError(
                f"{path} holds several sets of weights and none has a known name: "
                + ", ".join(f"{name!r} ({_weight_count(tree[name])} arrays)" for name in sets)
                + ". Save the one you want alone."
            )
        wrapper = wrapper or next(iter(sets), None)
        if wrapper is None:
            break
        tree, where = tree[wrapper], (*where, str(wrapper))
    raise CheckpointError(
        f"{path} holds no weights: {_outline(tree)}. Expected names with arrays, alone or under "
        f"one of {', '.join(WRAPPERS)}."
    )


def _read(path: Path) -> Any:
    _refuse_non_files(path)
    data = map_file(path)
    start = bytes(data[:64])
    # Before all others: the length that a safetensors file starts with may look like any of them.
    if _is_safetensors(data):
        return read_safetensors(data)
    if start.startswith(b"PK\3\4"):
        with zipfile.ZipFile(path) as archive:
            if any(is_program(name) for name in archive.namelist()):
                return read_torch_zip(data, archive)
            if all(name.endswith(".npy") for name in archive.namelist()):
                return read_npz(archive)
            raise CheckpointError("is a zip file without a checkpoint. Unpack it first.")
    if start.startswith(LEGACY):
        return read_torch_legacy(data)
    if start.startswith(b"\x80"):
        return _read_pickle(data)
    raise CheckpointError(_what_else(start))


def _read_pickle(data: memoryview) -> Any:
    """A plain pickle, or jt.save's: the pickle, its SHA-1, and a mark."""
    body = data
    if bytes(data[-len(JITTOR_END) :]) == JITTOR_END:
        body = data[: -len(JITTOR_END) - SHA1_SIZE]
        if hashlib.sha1(body).digest() != bytes(data[len(body) : len(body) + SHA1_SIZE]):
            raise CheckpointError("has a wrong SHA-1: damaged. Download or copy it again.")
    unpickler = Unpickler(body, 0, no_storages)
    tree = unpickler.load()
    if unpickler.position != len(body):
        raise CheckpointError(
            f"has {len(body) - unpickler.position} bytes behind its pickle: damaged or cut short."
        )
    return tree


def _is_safetensors(data: memoryview) -> bool:
    return bytes(data[8:9]) == b"{" and int.from_bytes(data[:8], "little") <= len(data)


def _refuse_non_files(path: Path) -> None:
    if path.is_dir():
        sharded = (path / ".metadata").is_file()
        raise CheckpointError(
            "is a sharded (FSDP) checkpoint. Merge it where torch is installed: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} NEW_FILE"
            if sharded
            else "is a folder, not a checkpoint. Name a file in it."
        )
    if not path.is_file():
        raise CheckpointError(f"does not exist (seen from {Path.cwd()}). Check the path.")
    if not path.stat().st_size:
        raise CheckpointError("is empty (0 bytes). Download or copy it again.")


def _what_else(start: bytes) -> str:
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself. Run `git lfs pull` in its repository."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return (
            "is a web page, probably the error or login page of a failed download. Open the link "
            "in a browser and download the file itself."
        )
    if start.startswith(b"\x1f\x8b"):
        return "is compressed by gzip. Unpack it first: gunzip, or tar -xzf."
    if len(start) < 16:
        return f"has {len(start)} bytes, too few for a checkpoint. Download or copy it again."
    return (
        f"is no known checkpoint: it starts with {start[:8]!r}. Known are torch (zip and legacy), "
        "safetensors, npz, Jittor and pickles of arrays; a cut-off start looks like this as well."
    )


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


def _weight_count(value: Any) -> int:
    if not isinstance(value, dict):
        return 0
    return sum(_is_weight(name, item) for name, item in value.items())


def _outline(tree: Any) -> str:
    if not isinstance(tree, dict):
        return f"it is one {type(tree).__name__}"
    entries = [f"{name!r:.40} ({type(value).__name__})" for name, value in tree.items()]
    return "it has " + (", ".join(entries[:8]) or "no entries")
