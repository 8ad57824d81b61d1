"""Read a Python config by its syntax tree, with the files that it starts from. Nothing is run.

Two layouts: `_base_` chains of MMEngine, whose dictionaries are merged (`_delete_=True` replaces),
and modules that start from another one by `from .. import *`. A statement that is not understood
makes everything that it may change unread; it never guesses.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segmill.convert.expressions import Attributes, Budget, Evaluator, Imported, Unread
from segmill.errors import SegmillError

LARGEST_FILE = 1 << 20
DEEPEST = 20  # files that start from each other
HARMLESS = frozenset({"print", "os.makedirs", "os.path.exists", "sys.path.append"})


@dataclass
class Config:
    """The top-level names of a config. `files`: all that were read, the one asked for first."""

    values: dict[str, Any]
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_config(path: Path) -> Config:
    """Read `path` and what it starts from; raise SegmillError where a file is missing."""
    config = Config({})
    names = _Reader(path, config, Budget(), ()).read()
    config.values = {
        name: value
        for name, value in names.items()
        if not name.startswith("__") and name != "_base_" and not isinstance(value, Imported)
    }
    return config


def merged(base: Any, child: Any) -> Any:
    """`child` over `base`, as MMEngine merges: dictionaries entry by entry, anything else whole."""
    if not isinstance(child, dict):
        return child
    if isinstance(base, Unread) and not child.get("_delete_", False):
        return base
    start = base if isinstance(base, dict) and not child.get("_delete_", False) else {}
    result = dict(start)
    for key, value in child.items():
        if key != "_delete_":
            result[key] = merged(result.get(key), value)
    return result


class _Reader:
    """Reads one file; `above` are the files that lead to it."""

    def __init__(self, path: Path, config: Config, budget: Budget, above: tuple[Path, ...]) -> None:
        self.path, self.config, self.budget = path, config, budget
        self.above = (*above, path.resolve())
        if path.resolve() in above or len(above) > DEEPEST:
            raise SegmillError(f"{path} starts from itself, by way of {above[-1]}.")
        self.names: dict[str, Any] = {}
        self.eval = Evaluator(path.name, self.names, None, budget)

    def read(self) -> dict[str, Any]:
        """The names that the file sets, over those of its bases."""
        tree = _parsed(self.path)
        self.config.files.append(self.path)
        base = self._bases(tree)
        self.eval.base = base
        for statement in tree.body:
            self._statement(statement)
        return merged(base, self.names) if base is not None else self.names

    def _bases(self, tree: ast.Module) -> dict[str, Any] | None:
        """The merged `_base_` files, None without any."""
        node = next((each for each in tree.body if "_base_" in _assigned(each)), None)
        if node is None:
            return None
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        assert node.value is not None
        listed = self.eval.value(node.value)
        names = [listed] if isinstance(listed, str) else listed
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise SegmillError(
                f"{self.path}, line {node.lineno}: _base_ should be a path or a list of paths."
            )
        found: dict[str, Any] = {}
        for name in names:
            values = self._other(self.path.parent / name, node.lineno)
            if twice := sorted(set(found) & set(values)):
                self.config.notes.append(f"{', '.join(twice)}: in two files of _base_, the later")
            found |= values
        return found

    def _other(self, path: Path, line: int) -> dict[str, Any]:
        if not path.is_file():
            package = " It is in an installed package: copy it here." if "::" in str(path) else ""
            raise SegmillError(
                f"{self.path}, line {line}, starts from {path}, which does not exist.{package} A "
                "config is read with its bases, so keep the folders as they are in its repository."
            )
        return _Reader(path, self.config, self.budget, self.above).read()

    def _statement(self, node: ast.stmt) -> None:
        self.budget.spend()
        if any(isinstance(each, ast.NamedExpr) for each in ast.walk(node)):
            self._doubt(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            self._import(node)
        elif isinstance(node, ast.Assign):
            value = self.eval.value(node.value)
            for target in node.targets:
                self._assign(target, value)
            self._doubt_calls(node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self.eval.value(node.value))
            self._doubt_calls(node.value)
        elif isinstance(node, ast.AugAssign):
            self._add(node)
        elif isinstance(node, ast.Expr):
            self._expression(node.value)
        elif isinstance(node, ast.With) and ast.unparse(node.items[0]) == "read_base()":
            for each in node.body:
                self._statement(each)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.names[node.name] = self.eval.unread(node, f"{node.name} is code")
        elif not isinstance(node, ast.Pass):
            self._doubt(node)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if not relative:
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for each in node.names:
                plain = each.name if each.asname or start else each.name.partition(".")[0]
                self.names[each.asname or plain] = Imported(f"{start}{plain}")
            self.config.notes.append(
                f"{self.path.name}, line {node.lineno}: `{ast.unparse(node)}` is not run"
            )
            return
        assert isinstance(node, ast.ImportFrom)
        values = self._other(self._module(node), node.lineno)
        for each in node.names:
            if each.name == "*":
                self.names.update(values)
            else:
                missing = self.eval.unread(node, f"{each.name} is not in that file")
                self.names[each.asname or each.name] = values.get(each.name, missing)

    def _module(self, node: ast.ImportFrom) -> Path:
        folder = self.path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        path = folder.joinpath(*(node.module or "").split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            values = list(value) if isinstance(value, list | tuple) else []
            if len(values) != len(target.elts):
                values = [self.eval.unread(target, "the values are not known one by one")] * len(
                    target.elts
                )
            for each, item in zip(target.elts, values, strict=True):
                self._assign(each, item)
        elif isinstance(target, ast.Attribute | ast.Subscript):
            self._assign_part(target, value)
        else:
            self._doubt(target)

    def _assign_part(self, target: ast.Attribute | ast.Subscript, value: Any) -> None:
        owner = self.eval.value(target.value)
        whole = isinstance(target, ast.Attribute)
        key = target.attr if whole else self.eval.value(target.slice)
        entry = isinstance(owner, Attributes) or (isinstance(owner, dict) and not whole)
        if entry and not isinstance(key, Unread):
            owner[key] = value
            return
        if isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner):
            owner[key] = value
            return
        self._doubt(target)

    def _add(self, node: ast.AugAssign) -> None:
        """`x += y` is `x = x + y`; a list grows in place."""
        load: Any = ast.parse(ast.unparse(node.target), mode="eval").body
        old, more = self.eval.value(load), self.eval.value(node.value)
        if isinstance(node.op, ast.Add) and isinstance(old, list) and isinstance(more, list):
            old.extend(more)
            return
        result = self.eval.value(
            ast.copy_location(ast.BinOp(load, node.op, node.value), node)  # pyright: ignore
        )
        self._assign(node.target, result)

    def _expression(self, node: ast.expr) -> None:
        """A docstring, a method that changes a list or a dictionary, or something unknown."""
        if isinstance(node, ast.Constant):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = self.eval.value(node.func.value)
            values = [self.eval.value(each) for each in node.args]
            plain = not node.keywords and not any(isinstance(each, Unread) for each in values)
            name = node.func.attr
            if isinstance(owner, list) and plain and name in ("append", "extend", "insert"):
                getattr(owner, name)(*values)
                return
            if type(owner) is dict and name == "update" and plain and isinstance(values[0], dict):
                owner.update(values[0])
                return
        self._doubt(node)

    def _doubt(self, node: ast.AST) -> None:
        """Whatever this statement may change is unread from here on."""
        reason = self.eval.unread(node, f"`{_start(node)}` may change it")
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store | ast.Del):
                self.names[each.id] = reason
            elif isinstance(each, ast.Attribute | ast.Subscript):
                if isinstance(each.ctx, ast.Store | ast.Del):
                    self._forget(self.eval.value(each.value), reason)
            elif isinstance(each, ast.Call):
                for part in self._changeable(each):
                    self._forget(part, reason)

    def _changeable(self, call: ast.Call) -> Iterator[Any]:
        function = self.eval.value(call.func)
        if isinstance(function, Imported) and function.name in HARMLESS:
            return
        for each in (*call.args, *(keyword.value for keyword in call.keywords)):
            yield self.eval.value(each.value if isinstance(each, ast.Starred) else each)
        if isinstance(call.func, ast.Attribute):
            yield self.eval.value(call.func.value)

    def _doubt_calls(self, node: ast.expr) -> None:
        """An unknown function may change the dictionaries and lists that it is given."""
        for each in ast.walk(node):
            if isinstance(each, ast.Call) and isinstance(self.eval.called(each), Unread):
                reason = self.eval.unread(each, f"`{_start(each)}` may change it")
                for part in self._changeable(each):
                    self._forget(part, reason)

    def _forget(self, value: Any, reason: Unread) -> None:
        """Put `reason` everywhere that this very dictionary or list is, or one inside it."""
        for part in list(_containers(value)):
            for name, each in self.names.items():
                self.names[name] = _without(each, part, reason)


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _containers(each)


def _without(value: Any, lost: Any, reason: Unread) -> Any:
    if value is lost:
        return reason
    if isinstance(value, dict):
        for key, each in value.items():
            value[key] = _without(each, lost, reason)
    elif isinstance(value, list):
        value[:] = [_without(each, lost, reason) for each in value]
    return value


def _parsed(path: Path) -> ast.Module:
    if path.is_dir():
        raise SegmillError(f"{path} is a folder, not a config. Name a .py file in it.")
    if not path.is_file():
        raise SegmillError(f"{path} does not exist (seen from {Path.cwd()}). Check the path.")
    if path.stat().st_size > LARGEST_FILE:
        raise SegmillError(f"{path} has more than {LARGEST_FILE} bytes: this is no config.")
    try:
        return ast.parse(path.read_text(encoding="utf-8-sig"), filename=str(path))
    except UnicodeDecodeError as error:
        raise SegmillError(f"{path} is no text ({error.reason}), so no Python config.") from error
    except SyntaxError as error:
        raise SegmillError(f"{path}, line {error.lineno}, is no Python: {error.msg}.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise SegmillError(f"{path} cannot be read as Python ({error!s:.80}).") from error


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    return [each.id for each in targets if isinstance(each, ast.Name)]


def _start(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0][:60]
