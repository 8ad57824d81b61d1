"""Write what `jt.save` writes, so that Jittor users can load it, without Jittor being installed."""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.read import JITTOR_END
from segmill.files import write_whole

# Pickle protocol 4, one opcode a name; nothing is memoised because nothing repeats but globals.
PROTOCOL, EMPTY_DICT, MARK, SET_ITEMS, STOP = b"\x80\x04", b"}", b"(", b"u", b"."
STACK_GLOBAL, REDUCE, BUILD, NONE, FALSE, TRUE = b"\x93", b"R", b"b", b"N", b"\x89", b"\x88"
TUPLE, TUPLE1, TUPLE3 = b"t", b"\x85", b"\x87"


Tree = Mapping[str, Any]  # a dictionary of arrays, or of such dictionaries


def write_jittor(path: Path, arrays: Tree) -> None:
    """Write {name: array} as a dictionary of Jittor variables, whole or not at all.

    A dictionary within it is written as one.
    """
    pickle = PROTOCOL + _dictionary(arrays) + STOP
    write_whole(path, pickle + hashlib.sha1(pickle).digest() + JITTOR_END)


def _dictionary(tree: Tree) -> bytes:
    items = b"".join(
        _text(name) + (_dictionary(value) if isinstance(value, Mapping) else _variable(value))
        for name, value in tree.items()
    )
    return EMPTY_DICT + MARK + items + SET_ITEMS


def _variable(array: Shaped[np.ndarray, "..."]) -> bytes:
    return _global("jittor", "jittor_core.Var") + _array(array) + TUPLE1 + REDUCE


def _array(array: Shaped[np.ndarray, "..."]) -> bytes:
    """numpy's own pickle of an array, under the module name that numpy 1 and 2 both know."""
    empty = MARK + _integer(0) + TUPLE
    start = _global("numpy.core.multiarray", "_reconstruct") + _global("numpy", "ndarray")
    shape = MARK + b"".join(_integer(extent) for extent in array.shape) + TUPLE
    content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    state = MARK + _integer(1) + shape + _dtype(array.dtype) + FALSE + _bytes(content) + TUPLE
    return start + empty + _bytes(b"b") + TUPLE3 + REDUCE + state + BUILD


def _dtype(dtype: np.dtype) -> bytes:
    code = _text(f"{dtype.kind}{dtype.itemsize}") + FALSE + TRUE + TUPLE3
    order = "|" if dtype.itemsize == 1 else "<"
    sizes = _integer(-1) + _integer(-1) + _integer(0)
    state = MARK + _integer(3) + _text(order) + NONE + NONE + NONE + sizes + TUPLE
    return _global("numpy", "dtype") + code + REDUCE + state + BUILD


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + STACK_GLOBAL


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _bytes(value: bytes) -> bytes:
    return b"\x8e" + struct.pack("<Q", len(value)) + value


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
