"""Key rules: from a file's names to a network's."""

import numpy as np
import pytest

from segmill.checkpoint.keys import Concat, Drop, Prefix, Rename, apply_rules
from segmill.checkpoint.report import compare
from segmill.checkpoint.storage import CheckpointError


def zeros(*names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, 3)) for name in names}


def test_a_key_without_a_rule_keeps_its_name() -> None:
    assert list(apply_rules(zeros("a.w", "b.w"), ())) == ["a.w", "b.w"]


def test_the_first_rule_that_matches_the_whole_key_wins() -> None:
    rules = (Rename(r"a\.(\w+)", r"first.\1"), Rename(r"a\.w", "second"), Rename(r"a", "part"))
    assert list(apply_rules(zeros("a.w", "a.w.b"), rules)) == ["first.w", "a.w.b"]


def test_a_transform_permutes_what_a_rule_renames() -> None:
    rules = (Rename("w", "v", transform=np.transpose),)
    assert apply_rules(zeros("w"), rules)["v"].shape == (3, 2)


def test_dropped_keys_are_gone() -> None:
    assert not apply_rules(zeros("a.relative_position_index"), (Drop(r".*_index"),))


def test_a_prefix_is_changed_before_the_rules_below_read_the_key() -> None:
    rules = (Prefix("module.", ""), Prefix("", "backbone."), Rename(r"backbone\.w", "v"))
    assert list(apply_rules(zeros("module.w", "b"), rules)) == ["v", "backbone.b"]


QKV = tuple(
    Concat(rf"(.*)\.{name}\.weight", r"\1.qkv.weight", index=index, parts=3)
    for index, name in enumerate(("query", "key", "value"))
)


def test_parts_are_joined_in_the_order_of_their_index() -> None:
    arrays = {
        "a.value.weight": np.full((1, 2), 2),
        "a.query.weight": np.full((1, 2), 0),
        "a.key.weight": np.full((1, 2), 1),
    }
    assert apply_rules(arrays, QKV)["a.qkv.weight"][:, 0].tolist() == [0, 1, 2]


def test_a_missing_part_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.qkv\.weight'.*lacks part \[1\]"):
        apply_rules(zeros("a.query.weight", "a.value.weight"), QKV)


def test_parts_that_do_not_fit_are_an_error() -> None:
    arrays = zeros("a.query.weight", "a.key.weight") | {"a.value.weight": np.zeros((2, 4))}
    with pytest.raises(CheckpointError, match="do not fit together"):
        apply_rules(arrays, QKV)


def test_two_keys_for_one_target_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="'a' and 'b'"):
        apply_rules(zeros("a", "b"), (Rename("a|b", "c"),))
    with pytest.raises(CheckpointError, match="part 0"):
        apply_rules(zeros("a", "b"), (Concat("a|b", "c", index=0, parts=2),))
    both = (Rename("a", "c"), Concat("b", "c", index=0, parts=1))
    with pytest.raises(CheckpointError, match="both become 'c'"):
        apply_rules(zeros("a", "b"), both)


SHAPES = {"a": (2, 3), "b": (2, 3), "bn.num_batches_tracked": ()}


def test_a_report_lists_everything_that_does_not_fit() -> None:
    report = compare(zeros("a", "c") | {"b": np.zeros(4)}, SHAPES | {"d": (1,)})
    assert (report.loaded, report.missing, report.unused) == (("a",), ("d",), ("c",))
    assert report.wrong_shape == (("b", (4,), (2, 3)),)
    text = report.text()
    assert text.startswith("1 loaded, 1 missing, 1 unused, 1 of wrong shape")
    assert "b: file (4,), network (2, 3)" in text


def test_counters_of_batches_are_neither_missing_nor_unused() -> None:
    assert compare(zeros("a", "b"), SHAPES).problems == 0
    counter = {"other.num_batches_tracked": np.array(3)}
    assert compare(zeros("a", "b") | counter, SHAPES).problems == 0


def test_each_exception_has_to_be_named() -> None:
    report = compare(zeros("a", "extra.w"), SHAPES)
    with pytest.raises(CheckpointError, match=r"(?s)missing in the file:.*b.*may_miss"):
        report.raise_unless_allowed((), [r"extra\..*"])
    with pytest.raises(CheckpointError, match="extra"):
        report.raise_unless_allowed(["b"], ["extra"])  # whole keys only
    report.raise_unless_allowed(["b"], [r"extra\..*"])
    assert "2 excused" in report.excuse(["b"], [r"extra\..*"]).text()


def test_a_wrong_shape_needs_both_exceptions() -> None:
    report = compare(zeros("a") | {"b": np.zeros(4)}, SHAPES)
    with pytest.raises(CheckpointError, match="network"):
        report.raise_unless_allowed(["b"], [])
    report.raise_unless_allowed(["b"], ["b"])


def test_long_lists_are_cut() -> None:
    text = compare(zeros(*(f"w{n}" for n in range(40))), {}).text()
    assert "... and 28 more" in text
    assert len(text.split("\n")) < 20
