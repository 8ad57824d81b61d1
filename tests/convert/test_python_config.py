"""Python configs are read without being run: what is worked out, and what says that it is not."""

import re
from pathlib import Path

import pytest

from segmill.convert import python_config
from segmill.convert.expressions import Budget, Unread
from segmill.convert.python_config import read_config
from segmill.errors import SegmillError
from written_configs import DFORMER, TINY, write_configs


def values(tmp_path: Path, **files: str) -> dict:
    write_configs(tmp_path, {f"{name}.py": text for name, text in files.items()})
    return read_config(tmp_path / "top.py").values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * 3 - 1", 5),
        ("(1, *[2, 3])", (1, 2, 3)),
        ("[1.0] * 2 + [0.1]", [1.0, 1.0, 0.1]),
        ("dict(a=1, **dict(b=2))", {"a": 1, "b": 2}),
        ("{'a': 1, **{'b': 2}}", {"a": 1, "b": 2}),
        ("[int(512 * x * 0.1) for x in range(5, 8)]", [256, 307, 358]),
        ("[dict(k=i) for i in (1, 2) if i > 1]", [{"k": 2}]),
        ("{f's{i}': n for i, n in enumerate([4, 5])}", {"s0": 4, "s1": 5}),
        ("'a' + '/' + 'b'.upper()", "a/B"),
        ("[1, 2, 3][-1] if 2 > 1 else 0", 3),
        ("-1e-6", -1e-6),
        ("len('abc') // 2", 1),
        ("dict(a=dict(b=7))['a']['b']", 7),
    ],
)
def test_plain_expressions_are_worked_out(text: str, value: object, tmp_path: Path) -> None:
    assert values(tmp_path, top=f"x = {text}")["x"] == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("open('marker', 'w').write('run')", r"open\(...\) is not called"),
        ("__import__('os').getcwd()", "not called"),
        ("nowhere + 1", "the name nowhere is not set"),
        ("(lambda: 1)()", "is not worked out|not called"),
        ("1 / 0", "division by zero"),
        ("9 ** 9999", "too large"),
        ("'x' * 100000", "too long"),
        ("[0] * 9999 * 9999", "too long"),
        ("range(10 ** 9)", "more than"),
        ("'%999999999d' % 1", "is not worked out"),
        ("'{0.__class__}'.format(1)", "not called"),
        ("().__class__", "attribute __class__"),
        ("'{{ fileDirname }}/x'", "placeholder"),
    ],
)
def test_anything_else_is_unread_and_says_why(text: str, why: str, tmp_path: Path) -> None:
    found = values(tmp_path, top=f"y = 1\nx = dict(good=y, bad={text})")["x"]
    assert found["good"] == 1
    assert isinstance(found["bad"], Unread)
    assert found["bad"].line == 2
    assert re.search(why, found["bad"].why), found["bad"].why


def test_nothing_is_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values(tmp_path, top="import os\nos.mkdir('marker')\nopen('marker2', 'w')\nx = os.listdir('.')")
    assert [path.name for path in tmp_path.iterdir()] == ["top.py"]


def test_dictionaries_of_bases_are_merged(tmp_path: Path) -> None:
    found = values(
        tmp_path,
        a="x = dict(k=1, deep=dict(p=1, q=[1, 2]))\nsize = (4, 4)",
        b="y = dict(k=1, l=2)",
        top="""
_base_ = ['a.py', './b.py']
x = dict(deep=dict(q=[3]))
y = dict(_delete_=True, m=3)
z = dict(size={{_base_.size}}, k=_base_.x.k)
""",
    )
    assert found["x"] == {"k": 1, "deep": {"p": 1, "q": [3]}}
    assert found["y"] == {"m": 3}
    assert found["z"] == {"size": (4, 4), "k": 1}


def test_what_changes_unread_values_stays_unread(tmp_path: Path) -> None:
    found = values(
        tmp_path, a="x = make()", top="_base_ = 'a.py'\nx = dict(k=1)\ny = dict(_delete_=True, k=1)"
    )
    assert isinstance(found["x"], Unread), "the base may have had other entries"
    assert found["y"] == {"k": 1}


@pytest.mark.parametrize(
    "statement",
    [
        "for i in range(3):\n    x['k'] = i",
        "if True:\n    x = dict(k=9)",
        "change(x)",
        "change(dict(inner=[x]))",
        "change(inner=x)",
        "x.pop('k')",
        "del x['k']",
        "x.setdefault('l', 3)",
        "outer['x'].clear()",
        "y = change(x)",
        "y = [dict(k=x.pop('k'))]",
    ],
)
def test_a_statement_that_may_change_a_value_makes_it_unread(
    statement: str, tmp_path: Path
) -> None:
    found = values(tmp_path, top=f"x = dict(k=1)\nouter = dict(x=x)\nsafe = 5\n{statement}")
    assert isinstance(found["x"], Unread)
    assert found["safe"] == 5


def test_plain_changes_are_followed(tmp_path: Path) -> None:
    found = values(
        tmp_path,
        top="""
x = dict(k=1)
alias = x
x['k'] = 2
x.update(dict(l=3))
steps = [1]
same = steps
steps.append(2)
steps += [3]
n = 1
n += 1
a, b = 4, 5
""",
    )
    assert found["alias"] == {"k": 2, "l": 3}
    assert found["same"] == [1, 2, 3]
    assert (found["n"], found["a"], found["b"]) == (2, 4, 5)


def test_modules_that_start_from_each_other_share_their_dictionary(tmp_path: Path) -> None:
    write_configs(tmp_path, DFORMER)
    config = read_config(tmp_path / TINY)
    found = config.values["C"]
    assert found is config.values["config"]
    assert found["niters_per_epoch"] == 100
    assert found["dataset_path"] == "datasets/NYUDepthv2"
    assert found["norm_mean"] == [0.485, 0.456, 0.406]
    assert isinstance(found["log_dir"], Unread)
    assert len(config.files) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "_base_ = 'gone.py'"}, r"starts from .*gone.py, which does not exist"),
        ({"top": "_base_ = 'mmseg::x.py'"}, "installed package"),
        ({"top": "_base_ = f()"}, "_base_ should be a path or a list of paths"),
        ({"top": "_base_ = 'a.py'", "a": "_base_ = 'top.py'"}, "starts from itself"),
        ({"top": "from .gone import *"}, r"starts from .*gone.py"),
        ({"top": "x = ("}, "line 1, is no Python"),
        ({"top": "x = 1" + " + 1" * 20000}, "cannot be read|RecursionError|is no Python|steps"),
    ],
)
def test_files_that_cannot_be_read_are_named(files: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SegmillError, match=message):
        values(tmp_path, **files)


def test_a_config_that_never_ends_ends(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(python_config, "Budget", lambda: Budget(100))
    with pytest.raises(SegmillError, match="steps to read"):
        values(tmp_path, top="x = [[i + j for i in range(20)] for j in range(20)]")


def test_a_byte_order_mark_is_no_code(tmp_path: Path) -> None:
    (tmp_path / "top.py").write_text("x = 1", encoding="utf-8-sig")
    assert read_config(tmp_path / "top.py").values == {"x": 1}


def test_an_annotated_base_is_a_base(tmp_path: Path) -> None:
    assert values(tmp_path, a="x = 1", top="_base_: list[str] = ['a.py']\ny = 2") == {
        "x": 1,
        "y": 2,
    }


def test_what_an_expression_names_by_the_way_is_unread(tmp_path: Path) -> None:
    found = values(tmp_path, top="n = 1\nm = (n := 5) + 1\nk = n")
    assert all(isinstance(found[name], Unread) for name in "nmk")
