"""The globals that a checkpoint's pickle may name, and what stands for them. Nothing is imported.

`CALLS` gives a value (tensor, array, dictionary, number). `INERT` names classes that hold no
weights: they become `Inert`, which keeps name, arguments and state and has no behaviour. A global
in neither is refused by the unpickler.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.storage import (
    BFLOAT16,
    CheckpointError,
    Element,
    Storage,
    UnreadStorage,
    decode,
)

Array = Shaped[np.ndarray, "..."]
PLAIN_DTYPE = r"[<>=|]?(\?|[biufcSU]\d+)"


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names: `torch._utils._rebuild_tensor_v2`."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object of a class that is never built: argparse.Namespace, a log buffer, a path."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(eq=False)
class NumpyDtype:
    """A dtype while it is unpickled: first its code, then (BUILD) its byte order."""

    code: str
    order: str = "="

    def value(self) -> np.dtype:
        """Numbers and text only: objects, structures and dates have no place in weights."""
        if not re.fullmatch(PLAIN_DTYPE, self.code):
            raise CheckpointError(f"holds a numpy array of dtype {self.code!r}, not of numbers.")
        dtype = np.dtype(self.code)
        if self.order in ("<", ">"):
            dtype = dtype.newbyteorder("<" if self.order == "<" else ">")
        return dtype


@dataclass(eq=False)
class NumpyArray:
    """An array while it is unpickled: empty until BUILD. `memo` lists who must learn the result."""

    memo: list[int] = field(default_factory=list)


def build_array(state: tuple[Any, ...]) -> Array | Inert:
    """The array of numpy's pickle state (version, shape, dtype, is_fortran, bytes)."""
    shape, dtype, is_fortran, content = state[-4:]
    if isinstance(content, list):
        return Inert("numpy.ndarray", (shape,), content)
    return _shaped(content, dtype.value(), shape, "F" if is_fortran else "C")


def _shaped(content: Any, dtype: np.dtype, shape: Iterable[int], order: str) -> Array:
    # Python 2 pickled bytes as a string.
    raw = content.encode("latin1") if isinstance(content, str) else content
    values = decode(memoryview(raw).cast("B"), Element(dtype))
    return values.reshape(tuple(shape), order="F" if order == "F" else "C")


def _numpy_scalar(dtype: NumpyDtype, content: Any) -> Any:
    return _shaped(content, dtype.value(), (), "C")[()]


def _numpy_buffer(content: Any, dtype: NumpyDtype, shape: Iterable[int], order: str) -> Array:
    return _shaped(content, dtype.value(), shape, order)


def _tensor(
    storage: Storage | UnreadStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: Any = None,
    _hooks: Any = None,
    metadata: Mapping[str, Any] | None = None,
) -> Array:
    if metadata and any(metadata.values()):
        raise CheckpointError(f"holds a lazy tensor ({dict(metadata)}). Save its `.clone()`.")
    return storage.view(offset, size, stride)


def _tensor_of_dtype(
    storage: Storage | UnreadStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: Any,
    _hooks: Any,
    dtype: Global,
    metadata: Mapping[str, Any] | None = None,
) -> Array:
    if isinstance(storage, Storage):
        storage = Storage(storage.data, DTYPES[dtype.name])
    return _tensor(storage, offset, size, stride, None, None, metadata)


def _subclass(function: Global, _type: Any, arguments: tuple[Any, ...], _state: Any) -> Array:
    return REBUILD[function.name](*arguments)


def _first(value: Any, *_rest: Any) -> Any:
    return value


def check_keys(keys: Iterable[Any]) -> None:
    """Only flat keys: hashing tuples nested a million deep would overflow the C stack."""
    for key in keys:
        parts = key if type(key) is tuple else (key,)
        if not all(type(part) in KEY_TYPES for part in parts):
            raise CheckpointError(f"holds a dictionary key of type {type(key).__name__}: damaged.")


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    pairs = [(key, value) for key, value in (items.items() if isinstance(items, dict) else items)]
    check_keys(key for key, _ in pairs)
    return dict(pairs)


def _default_dictionary(_factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _dictionary(items)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    elements = list(items)
    check_keys(elements)
    return set(elements)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise CheckpointError(f"encodes bytes as {encoding!r}: damaged.")
    return text.encode("latin1")


def _attribute(owner: Global | Inert, name: str) -> Global:
    if owner.name not in OWNERS:
        raise CheckpointError(f"asks for the attribute {name!r} of {owner.name}: refused.")
    return Global(f"{owner.name}.{name}")


def _old_object(kind: Global, *_rest: Any) -> Any:
    return {} if kind.name in DICTIONARIES else Inert(kind.name)


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts)


KEY_TYPES = (str, int, float, bool, bytes, type(None), Global, Inert)

STORAGES = {
    f"torch.{kind}Storage": Element(np.dtype(code))
    for kind, code in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "<i1",
        "Byte": "<u1",
        "Bool": "?",
        "ComplexFloat": "<c8",
        "ComplexDouble": "<c16",
    }.items()
} | {
    "torch.BFloat16Storage": BFLOAT16,
    "torch.storage.UntypedStorage": Element(np.dtype("<u1")),
    "torch.UntypedStorage": Element(np.dtype("<u1")),
}
DTYPES = {
    f"torch.{name}": Element(np.dtype(code))
    for name, code in {
        "float64": "<f8",
        "float32": "<f4",
        "float16": "<f2",
        "int64": "<i8",
        "int32": "<i4",
        "int16": "<i2",
        "int8": "<i1",
        "uint8": "<u1",
        "uint16": "<u2",
        "uint32": "<u4",
        "uint64": "<u8",
        "bool": "?",
        "complex64": "<c8",
        "complex128": "<c16",
    }.items()
} | {"torch.bfloat16": BFLOAT16}

REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
}
# Subclasses of dict: their content counts, their behaviour does not.
DICTIONARIES = frozenset({
    "addict.addict.Dict",
    "collections.Counter",
    "collections.OrderedDict",
    "detectron2.config.config.CfgNode",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "munch.Munch",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
})  # fmt: skip
CALLS: dict[str, Callable[..., Any]] = {
    **REBUILD,
    **dict.fromkeys(DICTIONARIES, _dictionary),
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": tuple,
    "torch.device": _device,
    "collections.defaultdict": _default_dictionary,
    "collections.deque": lambda items=(), _maximum=None: list(items),
    "_codecs.encode": _encode,
    "jittor.jittor_core.Var": _first,
    "jittor_core.Var": _first,
    "numpy._core.multiarray._reconstruct": lambda *_arguments: NumpyArray(),
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.numeric._frombuffer": _numpy_buffer,
    "numpy.dtype": lambda code, *_flags: NumpyDtype(code),
    "builtins.getattr": _attribute,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.complex": complex,
    "builtins.bytearray": lambda content=b"", *_encoding: bytearray(
        content.encode("latin1") if isinstance(content, str) else content
    ),
    "copyreg._reconstructor": _old_object,
}
INERT = frozenset(STORAGES) | frozenset(DTYPES) | frozenset(
    f"{module}.{name}"
    for module, names in {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "functools": "partial",
        "operator": "getitem",
        "typing": "Any Union Optional Dict List Tuple",
        "builtins": "int long float str unicode bool list dict tuple bytes object slice "
        "range xrange type",
        "datetime": "datetime date time timedelta timezone",
        "decimal": "Decimal",
        "uuid": "UUID",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "numpy": "ndarray bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
        "float16 float32 float64 str_",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
        "numpy.random._mt19937": "MT19937",
        "numpy.random._pcg64": "PCG64",
        "torch": "Tensor strided channels_last contiguous_format preserve_format",
        "torch.nn.parameter": "Parameter Buffer",
        "torch.serialization": "_get_layout",
        "torch.torch_version": "TorchVersion",
        "torchvision.transforms.functional": "InterpolationMode",
        "PIL.Image": "Resampling",
        "mmcv.utils.config": "Config",
        "mmengine.config.config": "Config",
        "mmengine.config.lazy": "LazyObject LazyAttr",
        "mmengine.logging.history_buffer": "HistoryBuffer",
        "mmengine.logging.message_hub": "MessageHub",
        "omegaconf.base": "Metadata ContainerMetadata SCMode",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode "
        "PathNode EnumNode",
        "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
        "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    }.items()
    for name in names.split()
)  # fmt: skip
# Classes whose pickles name their own methods; a name is all that is kept of those.
OWNERS = frozenset({"mmengine.logging.history_buffer.HistoryBuffer"})
# Where Python 2 and numpy 1 had the same things.
MOVED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core": "numpy._core",
}


def allowed(module: str, name: str) -> Global:
    """The global by its present name, or an error that names it."""
    for old, new in MOVED.items():
        if module == old or module.startswith(old + "."):
            module = new + module[len(old) :]
    full = f"{module}.{name}"
    if full in CALLS or full in INERT or full.rpartition(".")[0] in OWNERS:
        return Global(full)
    raise CheckpointError(
        f"names the Python object `{full}`, which segmill does not build, because code from a "
        "checkpoint is never run. If you trust the file, save its weights alone where that code "
        "is installed: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)."
    )


def call(function: Global, arguments: tuple[Any, ...]) -> Any:
    """What calling the global gives: a value, or an inert stand-in."""
    if function.name in CALLS:
        return CALLS[function.name](*arguments)
    return Inert(function.name, arguments)
