"""Score tables: percent in print, fractions everywhere else."""

import io
import math

import numpy as np
from rich.console import Console

from segmill.report.tables import class_scores, headline, percent, score_line, score_table

NAMES = ("road", "天空", "never")
CONFUSION = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])


def test_classes_have_fractions_and_shares_of_the_pixels():
    road, sky, never = class_scores(NAMES, CONFUSION)
    assert (road.name, road.IoU, road.Acc, road.share) == ("road", 0.75, 0.75, 0.8)
    assert sky.IoU == 0.5
    assert math.isnan(never.IoU)


def test_a_column_for_predictions_that_are_no_class_counts_as_wrong():
    with_none = np.array([[6, 2, 0, 2], [0, 2, 0, 0], [0, 0, 0, 0]])
    assert class_scores(NAMES, with_none)[0].IoU == 0.6


def test_the_printed_table_is_in_percent():
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(NAMES, CONFUSION, title="camvid test"))
    text = console.file.getvalue()
    assert "75.00" in text
    assert "天空" in text
    assert "camvid test" in text


def test_the_line_names_the_protocol():
    line = score_line(CONFUSION, protocol="whole")
    assert line.startswith("mIoU 62.50  ")
    assert "protocol whole" in line


def test_the_headline_is_in_fractions():
    assert headline(CONFUSION)["aAcc"] == 0.8


def test_undefined_is_a_dash():
    assert percent(float("nan")) == "-"


def test_both_rules_for_absent_classes_are_shown_where_they_differ():
    dropped = score_line(CONFUSION, protocol="whole")
    assert "leave out absent classes; counting them as 0: mIoU 41.67, mAcc 58.33" in dropped
    zero = score_line(CONFUSION, protocol="nyu_ss", absent_class="zero")
    assert zero.startswith("mIoU 41.67  mAcc 58.33")
    assert "count absent classes as 0; leaving them out: mIoU 62.50, mAcc 87.50" in zero


def test_without_an_absent_class_there_is_one_mean():
    line = score_line(CONFUSION[:2, :2], protocol="whole", absent_class="zero")
    assert line == score_line(CONFUSION[:2, :2], protocol="whole")
    assert line.endswith("(percent; protocol whole)")


def test_the_table_says_below_what_the_other_rule_gives():
    console = Console(file=io.StringIO(), width=200)
    table = score_table(NAMES, CONFUSION, title="nyu", absent_class="zero")
    console.print(table)
    assert "leaving them out: mIoU 62.50" in " ".join(console.file.getvalue().split())
