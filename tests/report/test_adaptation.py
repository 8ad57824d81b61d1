"""What `segmill adapt` shows at the end: the table in three forms, dots, before and after."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from segmill.bootstrap import compare
from segmill.data.classes import Classes
from segmill.data.corruptions import CORRUPTIONS
from segmill.errors import SegmillError
from segmill.report.adaptation import write_adaptation_report
from segmill.report.charts import dot_chart
from segmill.report.comparison import print_table, write_csv
from segmill.report.examples import BeforeAfter
from segmill.tta.counts import ImageCounts, PixelCounts, areas_of
from segmill.tta.results import MethodResult, TaskResult

CLASSES = Classes(("road", "天空"), np.array([[9, 9, 9], [0, 0, 250]], np.uint8), ("street", "天"))
NAMES = ("street", "park", "river", "bridge")
WORSE, SAME, BETTER = (20, 24, 22, 26), (30, 34, 32, 36), (40, 44, 42, 46)  # hits of 50 an image
SEVEN = ("source", "bn", "tent", "sar", "eata", "cotta", "dusa")


def task_result(hits, corruption="fog", index=1, **changes):
    confusion = np.array([[[hit, 50 - hit], [0, 5]] for hit in hits])
    parts = {
        "task": f"{index:02d}_{corruption}_5",
        "corruption": corruption,
        "severity": 5,
        "names": NAMES,
        "counts": PixelCounts(
            areas=np.stack([areas_of(each) for each in confusion]),
            confusion=confusion.sum(axis=0),
        ),
        "seconds": 0.25,
        "peak_memory": 0,
        "loss": 0.0,
    }
    return TaskResult(**{**parts, **changes})


def method(name, *hits, corruptions=CORRUPTIONS):
    tasks = [
        task_result(each, corruption, index)
        for index, (each, corruption) in enumerate(zip(hits, corruptions, strict=False), start=1)
    ]
    return MethodResult(name=name, tasks=tuple(tasks), order="abc123")


def realistic(names=SEVEN):
    return [
        method(name, *[np.add(SAME, 2 * index).clip(0, 50)] * 15)
        for index, name in enumerate(names)
    ]


def printed(results, width):
    console = Console(file=io.StringIO(), width=width)
    print_table(results, seed=0, console=console)
    lines = console.file.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    return lines


def read_csv(tmp_path, results):
    write_csv(tmp_path / "results.csv", results, seed=0)
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def report(tmp_path, results, examples=()):
    write_adaptation_report(
        tmp_path / "report.html",
        title="fog",
        command="segmill adapt",
        classes=CLASSES,
        results=results,
        facts={"seed": "0"},
        examples=examples,
        seed=0,
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_fifteen_corruptions_and_seven_methods_are_readable_in_a_terminal(width):
    text = "\n".join(printed(realistic(), width))
    assert "…" not in text
    for part in (*SEVEN, "gauss.", "elastic", "mean", "diff.", "order abc123"):
        assert part in text


def test_methods_are_rows_where_there_is_room():
    assert printed(realistic(), 200)[1].startswith("source ")
    assert printed(realistic(), 100)[1].startswith("gauss. ")


def test_a_narrow_terminal_gets_the_methods_in_several_tables():
    lines = printed(realistic(), 50)
    assert sum(line.startswith("gauss. ") for line in lines) == 2


def test_only_differences_that_exclude_zero_have_a_star():
    mixed = (44, 24, 42, 28)
    results = [method(n, h) for n, h in (("source", SAME), ("tent", BETTER), ("sar", mixed))]
    source, tent, sar = (line.split() for line in printed(results, 120)[1:4])
    assert source == ["source", *[source[1]] * 2, "0.250"]
    assert tent[3].startswith("*+")
    assert sar[3].startswith("+")


def test_brackets_in_a_name_are_printed_as_they_are():
    results = [method("source", SAME), method("dusa[bold]", BETTER)]
    assert printed(results, 120)[2].startswith("dusa[bold] ")
    assert "dusa[bold]" in printed(results, 40)[0]


def test_severities_are_named_where_they_differ():
    tasks = [task_result(SAME, task=f"0{s}_fog_{s}", severity=s, names=NAMES) for s in (1, 3)]
    text = "\n".join(printed([MethodResult(name="bn", tasks=tuple(tasks), order="x")], 120))
    assert "fog 1" in text
    assert "fog 3" in text


def test_the_csv_holds_fractions_a_row_a_task_and_the_mean(tmp_path):
    source, tent = method("source", SAME, SAME), method("tent", BETTER, WORSE)
    rows = read_csv(tmp_path, [source, tent])
    assert [row["task"] for row in rows[3:]] == ["01_gaussian_noise_5", "02_shot_noise_5", "mean"]
    (found,) = compare([tent], source, seed=0)
    for row, result, interval in zip(rows[3:5], tent.tasks, found.tasks, strict=True):
        assert float(row["mIoU"]) == result.score
        assert tuple(float(row[key]) for key in ("difference", "low", "high")) == interval
    assert float(rows[5]["difference"]) == found.mean.difference
    assert float(rows[5]["mIoU"]) == tent.score
    assert (rows[5]["images"], rows[5]["order"]) == ("8", "abc123")


def test_what_is_not_known_is_empty_in_the_csv(tmp_path):
    row = read_csv(tmp_path, [method("source", SAME)])[0]
    assert row["difference"] == row["low"] == row["high"] == row["peak_memory_bytes"] == ""


def test_the_table_comes_first_with_the_best_of_each_column_marked(tmp_path):
    page = report(tmp_path, [method("source", SAME, SAME), method("tent", BETTER, WORSE)])
    assert re.findall(r"<h2>(.*?)</h2>", page)[:2] == ["Scores", "mIoU by corruption"]
    rows = re.findall(r'<td class="">(\w+)</td>(.*?)</tr>', page)
    marks = {name: re.findall(r'class="number ([\w ]*)"', cells) for name, cells in rows}
    # gaussian_noise, shot_noise, mean of both, difference, low, high, seconds
    assert marks["source"][:2] == ["", "best"]
    assert marks["tent"][:2] == ["above best", "below"]
    assert "order abc123" in page


def test_memory_is_a_column_where_it_was_measured(tmp_path):
    results = [method("source", SAME), method("bn", BETTER)]
    assert "GiB" not in report(tmp_path, results)
    measured = replace(results[1].tasks[0], peak_memory=5 << 29)
    page = report(tmp_path, [results[0], replace(results[1], tasks=(measured,))])
    assert '<th class="number">GiB</th>' in page
    assert ">2.5</td>" in page


def test_without_a_source_there_are_no_differences(tmp_path):
    page = report(tmp_path, [method("bn", SAME), method("tent", BETTER)])
    assert "diff." not in page
    assert "mIoU by corruption" in page
    assert "mIoU by corruption" not in report(tmp_path, [method("bn", SAME)])


def test_one_stream_of_all_corruptions_is_one_column(tmp_path):
    def stream(name, hits):
        task = task_result(hits, "mixed", severity=0, names=("a", "b", "b", "a"))
        return MethodResult(name=name, tasks=(task,), order="x")

    page = report(tmp_path, [stream("source", SAME), stream("tent", BETTER)])
    assert '<th class="number">mixed</th>' in page
    assert "severity" not in page


def test_pictures_show_the_corrupted_image_and_every_prediction(tmp_path):
    label = np.zeros((12, 16), np.uint8)
    example = BeforeAfter(
        np.full((12, 16, 3), 90, np.uint8), label, "street", "motion_blur", 5,
        {"source": label + 1, "tent": label},
    )  # fmt: skip
    page = report(tmp_path, [method("source", SAME), method("tent", BETTER)], [example])
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "motion blur",
        "truth",
        "before: source, mIoU 0.00 %",
        "after: tent, mIoU 100.00 %",
    ]
    assert "motion blur, severity 5" in page


def classified(name, right):
    counts = ImageCounts(rank=np.where(right, 0, 9), confidence=np.full(4, 0.7))
    return MethodResult(name=name, tasks=(task_result(SAME, counts=counts),), order="abc123")


def test_classification_has_top1_in_the_same_table_with_top5_and_calibration(tmp_path):
    results = [classified("source", [1, 0, 0, 0]), classified("tent", [1, 1, 1, 0])]
    lines = printed(results, 120)
    assert lines[0].split() == [
        "method",
        "fog",
        "mean",
        "diff.",
        "low",
        "high",
        "top5",
        "ece",
        "s/image",
    ]
    assert "+50.00" in lines[2]
    assert "top1 in percent" in " ".join(lines)
    rows = read_csv(tmp_path, results)
    assert list(rows[0])[5:8] == ["top1", "top5", "ece"]
    assert float(rows[2]["ece"]) == pytest.approx(0.05)
    page = report(tmp_path, results)
    assert "top1 by corruption" in page
    assert "mIoU" not in page


def test_pictures_of_classification_are_a_strip_with_what_each_method_says(tmp_path):
    examples = [
        BeforeAfter(
            np.full((20, 20, 3), 90, np.uint8), np.array([[label]]), f"image {label}", "fog", 5,
            {"source": np.array([[0]]), "tent": np.array([[1]], np.uint16)},
        )
        for label in (0, 1)
    ]  # fmt: skip
    page = report(tmp_path, [classified("source", [1, 0, 0, 0])], examples)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", page) == [
        "truth: street · before: source ✓ street · after: tent ✗ 天",
        "truth: 天 · before: source ✗ street · after: tent ✓ 天",
    ]


def test_names_cannot_break_the_page(tmp_path):
    evil = '<b title="'
    results = [method("source", SAME), method(evil, BETTER)]
    page = report(tmp_path, [replace(each, order=evil) for each in results])
    assert evil not in page


def test_results_of_other_images_make_no_table(tmp_path):
    other = MethodResult(name="tent", tasks=(task_result(SAME, names=NAMES[::-1]),), order="abc123")
    source = MethodResult(name="source", tasks=(task_result(SAME),), order="abc123")
    with pytest.raises(SegmillError, match="the same images"):
        report(tmp_path, [source, other])
    assert list(tmp_path.iterdir()) == []


def test_dots_lie_between_the_ticks_and_undefined_ones_are_left_out():
    values = np.array([[0.231, 0.618], [np.nan, 0.4]])
    chart = dot_chart("mIoU", ["fog", "snow"], ["source", "tent"], values, reference="source")
    (fog, dots), (_, others) = chart.rows
    assert fog == "fog"
    assert [dot.hint for dot in dots] == ["source 23.10%", "tent 61.80%"]
    assert [dot.shape for dot in dots] == ["stroke", "disc"]
    assert 0 <= dots[0].at < others[0].at < dots[1].at <= 100
    assert (chart.ticks[0][0], chart.ticks[-1][0]) == (0, 100)


def test_more_methods_than_colours_differ_by_shape():
    names = [f"m{index}" for index in range(14)]
    chart = dot_chart("", ["fog"], names, np.linspace(0, 1, 14)[None], reference="source")
    styles = [(colour, shape) for colour, shape, _ in chart.legend]
    assert len(set(styles)) == 14
