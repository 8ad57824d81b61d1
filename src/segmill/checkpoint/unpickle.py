"""Unpickle the object tree of a checkpoint without running anything that the file asks for.

A pickle is a program for a stack machine; this is that machine with only the steps that move data.
Where the real one would import and call, `allowed.py` says what stands for the global, or refuses.
The standard library's `pickle.Unpickler` is not used, even with `find_class` closed: a crafted
memo index makes it allocate gigabytes, BUILD writes into whatever object lies on the stack, and
every array would be copied. Here arrays stay views of the mapped file.
"""

import pickletools
from collections.abc import Callable
from typing import Any

from segmill.checkpoint.allowed import (
    Global,
    Inert,
    NumpyArray,
    NumpyDtype,
    allowed,
    build_array,
    call,
    check_keys,
)
from segmill.checkpoint.storage import CheckpointError, slice_of

OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
# Steps that push their own argument. The text forms (INT, STRING, ...) are not among them: every
# checkpoint is written in protocol 2 or later.
CONSTANTS = frozenset((
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINSTRING", "SHORT_BINSTRING",
    "SHORT_BINBYTES", "BYTEARRAY8", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINFLOAT",
))  # fmt: skip
LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# Length prefixes of byte strings that may hold a whole tensor.
BYTES_PREFIX = {"BINBYTES": 4, "BINBYTES8": 8}
COPY_BELOW = 4096
LINE_CHUNK = 256


class Unpickler:
    """Reads one pickle of `data`; afterwards `position` is the byte behind it."""

    def __init__(
        self, data: memoryview, position: int, load_storage: Callable[[tuple[Any, ...]], Any]
    ) -> None:
        self.data = data
        self.position = position
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._encoded = 0

    def load(self) -> Any:
        """The object tree: dictionaries, lists, numbers, text, arrays, `Inert`, `Global`."""
        while True:
            opcode = OPCODES[self.data[self.position]]
            self.position += 1
            name = opcode.name
            if name == "STOP":
                return self._stack.pop()
            if name in LITERALS:
                self._stack.append(LITERALS[name]())
            elif name in BYTES_PREFIX:
                self._stack.append(self._bytes(BYTES_PREFIX[name]))
            elif name in CONSTANTS:
                self._stack.append(self._argument(opcode))
            elif name in STEPS:
                STEPS[name](self, self._argument(opcode))
            else:
                raise CheckpointError(f"uses the pickle opcode {name}, which no checkpoint needs.")

    def _argument(self, opcode: Any) -> Any:
        # GLOBAL and INST read their two lines themselves: `pickletools` would undo escapes in them.
        if opcode.arg is None or opcode.name in ("GLOBAL", "INST"):
            return None
        return opcode.arg.reader(self)

    # `pickletools` reads an opcode's argument through this, as from a file.
    def read(self, length: int) -> bytes:
        """The next bytes, copied."""
        content = slice_of(self.data, self.position, length)
        self.position += length
        return bytes(content)

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            chunk = bytes(self.data[self.position : self.position + LINE_CHUNK])
            line += self.read(chunk.find(b"\n") + 1 or max(len(chunk), 1))
        return line[:-1].decode()

    def _bytes(self, prefix: int) -> bytes | memoryview:
        length = int.from_bytes(self.read(prefix), "little")
        if length < COPY_BELOW:
            return self.read(length)
        content = slice_of(self.data, self.position, length)
        self.position += length
        return content

    def _mark(self, _argument: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _pop(self, _argument: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _argument: None) -> None:
        self._since_mark()

    def _duplicate(self, _argument: None) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int | None) -> None:
        key, top = len(self._memo) if index is None else index, self._stack[-1]
        self._memo[key] = top
        if isinstance(top, NumpyArray):
            top.memo.append(key)

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _tuple(self, _argument: None) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _list(self, _argument: None) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _dictionary(self, _argument: None) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._store(items)

    def _frozenset(self, _argument: None) -> None:
        items = self._since_mark()
        check_keys(items)
        self._stack.append(frozenset(items))

    def _last_to_tuple(self, count: int) -> None:
        items = tuple(self._take(count))
        self._stack.append(items)

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise CheckpointError("holds a pickle that runs out of values: damaged.")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return items

    def _append(self, _argument: None) -> None:
        self._extend(self._take(1))

    def _appends(self, _argument: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise CheckpointError(f"appends to a {type(target).__name__}: damaged.")
        target.extend(items)

    def _set_item(self, _argument: None) -> None:
        self._store(self._take(2))

    def _set_items(self, _argument: None) -> None:
        self._store(self._since_mark())

    def _store(self, items: list[Any]) -> None:
        target, keys = self._stack[-1], items[::2]
        if not isinstance(target, dict):
            raise CheckpointError(f"sets items of a {type(target).__name__}: damaged.")
        check_keys(keys)
        target.update(zip(keys, items[1::2], strict=True))

    def _add_items(self, _argument: None) -> None:
        items, target = self._since_mark(), self._stack[-1]
        if not isinstance(target, set):
            raise CheckpointError(f"adds items to a {type(target).__name__}: damaged.")
        check_keys(items)
        target.update(items)

    def _global(self, _argument: None) -> None:
        self._stack.append(allowed(self._line(), self._line()))

    def _stack_global(self, _argument: None) -> None:
        module, name = self._take(2)
        self._stack.append(allowed(str(module), str(name)))

    def _reduce(self, _argument: None) -> None:
        function, arguments = self._take(2)
        self._call(function, tuple(arguments))

    def _new_object(self, _argument: None) -> None:
        kind, arguments = self._take(2)
        self._call(kind, tuple(arguments))

    def _new_object_with_keywords(self, _argument: None) -> None:
        kind, arguments, keywords = self._take(3)
        self._call(kind, tuple(arguments))
        self._state_of_top(keywords)

    def _instance(self, _argument: None) -> None:
        kind = allowed(self._line(), self._line())
        self._call(kind, tuple(self._since_mark()))

    def _object(self, _argument: None) -> None:
        kind, *arguments = self._since_mark()
        self._call(kind, tuple(arguments))

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        if not isinstance(function, Global):
            raise CheckpointError(f"calls a {type(function).__name__}: damaged.")
        value = call(function, arguments)
        if isinstance(value, bytes):
            # A short pickle could encode one long text a million times.
            self._encoded += len(value)
            if self._encoded > 2 * len(self.data):
                raise CheckpointError("unpacks to more bytes than it holds: refused.")
        self._stack.append(value)

    def _build(self, _argument: None) -> None:
        (state,) = self._take(1)
        self._state_of_top(state)

    def _state_of_top(self, state: Any) -> None:
        target = self._stack[-1]
        if isinstance(target, NumpyArray):
            self._stack[-1] = array = build_array(state)
            self._memo.update(dict.fromkeys(target.memo, array))
        elif isinstance(target, NumpyDtype):
            target.order = state[1]
        elif isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # of a dictionary only the items count
            raise CheckpointError(f"sets the state of a {type(target).__name__}: damaged.")

    def _persistent(self, _argument: None) -> None:
        (identity,) = self._take(1)
        self._stack.append(self._load_storage(identity))

    def _nothing(self, _argument: int) -> None:
        """PROTO and FRAME say how the rest is written, which the rest says itself."""


STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    "PROTO": Unpickler._nothing,
    "FRAME": Unpickler._nothing,
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "DUP": Unpickler._duplicate,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), Unpickler._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Unpickler._get),
    "TUPLE": Unpickler._tuple,
    "TUPLE1": lambda machine, _: machine._last_to_tuple(1),
    "TUPLE2": lambda machine, _: machine._last_to_tuple(2),
    "TUPLE3": lambda machine, _: machine._last_to_tuple(3),
    "LIST": Unpickler._list,
    "DICT": Unpickler._dictionary,
    "FROZENSET": Unpickler._frozenset,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "SETITEM": Unpickler._set_item,
    "SETITEMS": Unpickler._set_items,
    "ADDITEMS": Unpickler._add_items,
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new_object,
    "NEWOBJ_EX": Unpickler._new_object_with_keywords,
    "INST": Unpickler._instance,
    "OBJ": Unpickler._object,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}


def no_storages(identity: tuple[Any, ...]) -> Any:
    """`load_storage` of a plain pickle, which has none."""
    raise CheckpointError(f"refers to a storage outside its pickle ({identity!r:.60}): damaged.")
