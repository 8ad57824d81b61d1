"""Values of Python expressions in a config, worked out from the syntax tree. Nothing is executed.

What is known: literals, names set earlier, arithmetic, strings, lists, dictionaries, comprehensions
and a few functions without side effects. Everything else becomes an `Unread`, which says where and
why, and so does everything that is made of it.
"""

import ast
import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from segmill.errors import SegmillError

MOST_ITEMS, MOST_STEPS, LARGEST, LARGEST_POWER = 10_000, 100_000, 1 << 62, 64


@dataclass(frozen=True)
class Unread:
    """A value that only running the config would tell."""

    file: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"line {self.line} of {self.file}: {self.why}"


@dataclass(frozen=True)
class Imported:
    """A name of another package: `os.path.join`."""

    name: str


class Attributes(dict[str, Any]):
    """A dictionary whose keys are also attributes: easydict.EasyDict."""


@dataclass
class Budget:
    """Steps left for one config, so that a malicious one ends too."""

    left: int = field(default=MOST_STEPS)

    def spend(self) -> None:
        """One step."""
        self.left -= 1
        if self.left < 0:
            raise SegmillError(
                f"This config takes more than {MOST_STEPS} steps to read; no real one does."
            )


OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitOr: operator.or_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "sum": sum,
    "round": round,
    "sorted": sorted,
    "enumerate": lambda values: list(enumerate(values)),
    "zip": lambda *values: list(zip(*values, strict=False)),
    "range": lambda *ends: list(_bounded(range(*ends))),
    "os.path.join": lambda *parts: "/".join(part.rstrip("/") for part in parts),
    "numpy.array": list,
    "copy.deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
}
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        [
            "join",
            "replace",
            "lower",
            "upper",
            "strip",
            "lstrip",
            "rstrip",
            "split",
            "startswith",
            "endswith",
        ]
    ),
    dict: frozenset({"get", "copy", "keys", "values", "items"}),
    list: frozenset({"copy", "index", "count"}),
}
VIEWS = ("dict_keys", "dict_values", "dict_items")
WRONG = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Evaluator:
    """Works out expressions of one file; `names` is what its statements have set so far."""

    def __init__(self, file: str, names: Mapping[str, Any], base: Any, budget: Budget) -> None:
        self.file, self.names, self.base, self.budget = file, names, base, budget

    def value(self, node: ast.expr) -> Any:
        """The expression's value, or Unread."""
        self.budget.spend()
        method = getattr(self, f"_{type(node).__name__}", None)
        if method is None:
            return self.unread(node, f"`{ast.unparse(node)[:60]}` is not worked out")
        try:
            return method(node)
        except WRONG as error:
            return self.unread(node, f"`{ast.unparse(node)[:60]}` fails: {error!s:.80}")

    def unread(self, node: ast.AST, why: str) -> Unread:
        """An unread value at the place of `node`."""
        return Unread(self.file, getattr(node, "lineno", 0), why)

    def _Constant(self, node: ast.Constant) -> Any:  # noqa: N802
        if isinstance(node.value, str) and "{{" in node.value:
            return self.unread(node, f"the placeholder in {node.value[:60]!r} is not filled in")
        known = isinstance(node.value, str | int | float | bool | None)
        return node.value if known else self.unread(node, "neither text nor a number")

    def _Name(self, node: ast.Name) -> Any:  # noqa: N802
        if node.id == "_base_" and self.base is not None:
            return self.base
        if node.id in self.names:
            return self.names[node.id]
        if node.id in FUNCTIONS or node.id == "dict":
            return Imported(node.id)
        return self.unread(node, f"the name {node.id} is not set in this file")

    def _Attribute(self, node: ast.Attribute) -> Any:  # noqa: N802
        owner = self.value(node.value)
        if isinstance(owner, Unread):
            return owner
        if isinstance(owner, Imported):
            return Imported(f"{owner.name}.{node.attr}")
        if isinstance(owner, Attributes) or owner is self.base:
            return owner[node.attr]
        if isinstance(owner, dict) and node.attr not in METHODS[dict]:
            return owner[node.attr]  # mmengine's dictionaries have attributes too
        return self.unread(node, f"the attribute {node.attr} is not known")

    def _List(self, node: ast.List) -> Any:  # noqa: N802
        return self._items(node.elts)

    def _Tuple(self, node: ast.Tuple) -> Any:  # noqa: N802
        items = self._items(node.elts)
        return items if isinstance(items, Unread) else tuple(items)

    def _items(self, nodes: list[ast.expr]) -> list[Any] | Unread:
        items: list[Any] = []
        for node in nodes:
            value = self.value(node.value if isinstance(node, ast.Starred) else node)
            if not isinstance(node, ast.Starred):
                items.append(value)
            elif isinstance(value, Unread):
                return value
            else:
                items += _bounded(value)
        return items

    def _Dict(self, node: ast.Dict) -> Any:  # noqa: N802
        found: dict[Any, Any] = {}
        for key, each in zip(node.keys, node.values, strict=True):
            value = self.value(each)
            name = None if key is None else self.value(key)
            if isinstance(name, Unread) or (key is None and isinstance(value, Unread)):
                return name if isinstance(name, Unread) else value
            found |= dict(value) if key is None else {name: value}
        return found

    def _Set(self, node: ast.Set) -> Any:  # noqa: N802
        """`{{_base_.name}}`, which Python takes for a set of a set."""
        inner = node.elts[0]
        if isinstance(inner, ast.Set) and len(node.elts) == len(inner.elts) == 1:
            return self.value(inner.elts[0])
        return self.unread(node, "sets are not worked out")

    def _BinOp(self, node: ast.BinOp) -> Any:  # noqa: N802
        left, right = self.value(node.left), self.value(node.right)
        kind = type(node.op)
        if unread := _first_unread(left, right):
            return unread
        if kind is ast.Pow and not (abs(left) < 1e6 and abs(right) <= LARGEST_POWER):
            return self.unread(node, "the power is too large")
        if kind is ast.Mod and isinstance(left, str):
            return self.unread(node, "text formatted by % is not worked out")
        if kind is ast.Mult and _repeated(left, right) > MOST_ITEMS:
            return self.unread(node, "the product is too long")
        return self._checked(node, OPERATORS[kind](left, right))

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:  # noqa: N802
        value = self.value(node.operand)
        return value if isinstance(value, Unread) else OPERATORS[type(node.op)](value)

    def _BoolOp(self, node: ast.BoolOp) -> Any:  # noqa: N802
        value: Any = None
        for each in node.values:
            value = self.value(each)
            if isinstance(value, Unread) or bool(value) == isinstance(node.op, ast.Or):
                return value
        return value

    def _Compare(self, node: ast.Compare) -> Any:  # noqa: N802
        left = self.value(node.left)
        for kind, each in zip(node.ops, node.comparators, strict=True):
            right = self.value(each)
            if unread := _first_unread(left, right):
                return unread
            if not OPERATORS[type(kind)](left, right):
                return False
            left = right
        return True

    def _IfExp(self, node: ast.IfExp) -> Any:  # noqa: N802
        test = self.value(node.test)
        return test if isinstance(test, Unread) else self.value(node.body if test else node.orelse)

    def _Subscript(self, node: ast.Subscript) -> Any:  # noqa: N802
        owner = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            ends = (node.slice.lower, node.slice.upper, node.slice.step)
            index: Any = [None if each is None else self.value(each) for each in ends]
            return _first_unread(owner, *index) or owner[slice(*index)]
        index = self.value(node.slice)
        return _first_unread(owner, index) or owner[index]

    def _JoinedStr(self, node: ast.JoinedStr) -> Any:  # noqa: N802
        parts = []
        for each in node.values:
            plain = isinstance(each, ast.FormattedValue) and each.format_spec is None
            if not plain and not isinstance(each, ast.Constant):
                return self.unread(node, "the text's format is not worked out")
            value = self.value(each.value if isinstance(each, ast.FormattedValue) else each)
            if isinstance(value, Unread):
                return value
            parts.append(str(value))
        return "".join(parts)

    def _ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> Any:  # noqa: N802
        return [inner.value(node.elt) for inner in self._loops(node.generators)]

    _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp) -> Any:  # noqa: N802
        loops = self._loops(node.generators)
        return {inner.value(node.key): inner.value(node.value) for inner in loops}

    def _loops(self, generators: list[ast.comprehension]) -> Iterator["Evaluator"]:
        if not generators:
            yield self
            return
        first, *rest = generators
        values = self.value(first.iter)
        if isinstance(values, Unread):
            raise ValueError(values.why)
        for value in _bounded(values):
            names = {**self.names, **dict(_unpacked(first.target, value))}
            inner = Evaluator(self.file, names, self.base, self.budget)
            if all(_certain(inner.value(test)) for test in first.ifs):
                yield from inner._loops(rest)

    def _Call(self, node: ast.Call) -> Any:  # noqa: N802
        arguments = self._items(node.args)
        keywords = self._keywords(node)
        if isinstance(arguments, Unread) or isinstance(keywords, Unread):
            return arguments if isinstance(arguments, Unread) else keywords
        function = self.called(node)
        if isinstance(function, Unread):
            return function
        if function in (dict, Attributes):
            return _first_unread(*arguments) or function(*arguments, **keywords)
        return _first_unread(*arguments, *keywords.values()) or self._checked(
            node, function(*arguments, **keywords)
        )

    def _keywords(self, node: ast.Call) -> dict[str, Any] | Unread:
        found: dict[str, Any] = {}
        for each in node.keywords:
            value = self.value(each.value)
            if each.arg is None and isinstance(value, Unread):
                return value
            found |= dict(value) if each.arg is None else {each.arg: value}
        return found

    def called(self, node: ast.Call) -> Callable[..., Any] | Unread:
        """The function, where it is one of those that have no side effects."""
        if isinstance(node.func, ast.Attribute):
            owner = self.value(node.func.value)
            for kind, names in METHODS.items():
                if isinstance(owner, kind) and node.func.attr in names:
                    return getattr(owner, node.func.attr)
            if isinstance(owner, Unread):
                return owner
        function = self.value(node.func)
        name = function.name if isinstance(function, Imported) else ""
        if name in ("dict", "collections.OrderedDict"):
            return dict
        if name == "easydict.EasyDict":
            return Attributes
        if name in FUNCTIONS:
            return FUNCTIONS[name]
        return self.unread(node, f"{ast.unparse(node.func)[:60]}(...) is not called")

    def _checked(self, node: ast.AST, value: Any) -> Any:
        if type(value).__name__ in VIEWS:
            return list(value)
        too_large = isinstance(value, int) and abs(value) > LARGEST
        if too_large or _length(value) > MOST_ITEMS:
            return self.unread(node, "the result is too large")
        return value


def _unpacked(target: ast.expr, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and not isinstance(value, Unread):
        for each, item in zip(target.elts, value, strict=True):
            yield from _unpacked(each, item)
    else:
        raise ValueError("the loop's variable is not a name")


def _certain(value: Any) -> bool:
    if isinstance(value, Unread):
        raise ValueError(value.why)
    return bool(value)


def _first_unread(*values: Any) -> Unread | None:
    return next((value for value in values if isinstance(value, Unread)), None)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _repeated(left: Any, right: Any) -> int:
    """How long a product is: of two numbers 1, of a sequence and a number their product."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        return 1
    counts = (each if isinstance(each, int) else _length(each) for each in (left, right))
    return math.prod(counts)


def _bounded(values: Any) -> Any:
    if len(values) > MOST_ITEMS:
        raise ValueError(f"more than {MOST_ITEMS} items")
    return values
