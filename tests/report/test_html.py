"""The report: one file, complete, and safe with any text."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from segmill.data.classes import Classes
from segmill.report.charts import Curve
from segmill.report.examples import Example
from segmill.report.html import Result, TextTable, write_report

VOID = {"meta", "img", "br", "link", "input"}


class Balance(HTMLParser):
    """Follows open tags and collects addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def named(*names):
    return Classes(names, np.arange(3 * len(names), dtype=np.uint8).reshape(-1, 3), names)


def example(name, miou, channels=3):
    label = np.zeros((12, 16), np.uint8)
    image = np.full((12, 16, channels), 90, np.uint8)
    return Example(image, label, label, name, miou)


def report(tmp_path, **changes):
    parts = {
        "title": "a run",
        "command": "segmill train model=x",
        "classes": named("road", "sky"),
        "results": [Result("x", "whole", np.array([[6, 2], [0, 2]]))],
        "facts": {"seed": "0"},
        "curves": {"train/loss": Curve(np.arange(3.0), np.ones(3))},
        "examples": [example("street", 0.5)],
        "tables": [],
    }
    write_report(tmp_path / "report.html", **{**parts, **changes})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = Balance()
    parsed.feed(page)
    assert parsed.open == []
    return page, parsed


def test_everything_is_inside_the_file(tmp_path):
    page, parsed = report(tmp_path)
    assert all(source.startswith(("data:image/", "#")) for source in parsed.sources)
    assert "@import" not in page
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    # Names of XML vocabularies; no browser fetches them.
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_scores_protocol_command_and_facts_are_there(tmp_path):
    text = " ".join(report(tmp_path)[1].text)
    for part in ("62.50", "whole", "segmill train model=x", "seed", "street", "50.00"):
        assert part in text


def test_the_mean_under_the_other_rule_for_absent_classes_is_there(tmp_path):
    confusion = np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    results = [Result("x", "nyu_ss", confusion, absent_class="zero")]
    _, parsed = report(tmp_path, classes=named("a", "b", "c"), results=results, examples=[])
    text = " ".join(parsed.text)
    assert "41.67" in text
    assert "leaving them out: mIoU 62.50" in text


def test_chinese_names_are_kept(tmp_path):
    assert "天空" in " ".join(report(tmp_path, classes=named("道路", "天空"))[1].text)


def test_text_cannot_break_the_page(tmp_path):
    evil = '<script>alert("x")</script>'
    page, _ = report(tmp_path, title=evil, classes=named(evil, "sky"), facts={evil: evil})
    assert evil not in page


def test_several_results_are_compared(tmp_path):
    better = Result("RGB-D", "whole", np.array([[8, 0], [0, 2]]))
    worse = Result("RGB", "whole", np.array([[6, 2], [0, 2]]))
    page, _ = report(tmp_path, results=[worse, better])
    assert re.findall(r'best">([\d.]+)', page) == ["100.00"] * 4


def test_depth_and_other_predictions_are_shown(tmp_path):
    label = np.zeros((12, 16), np.uint8)
    image = np.zeros((12, 16, 4), np.uint8)
    both = Example(image, label, label, "room", 0.5, others={"RGB only": label})
    page, _ = report(tmp_path, examples=[both])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == ["image", "depth", "truth", "RGB only", "prediction", "errors"]


def test_examples_are_split_into_best_and_worst(tmp_path):
    shown = [example(name, miou) for name, miou in (("b", 0.6), ("d", 0.1), ("a", 0.9), ("c", 0.3))]
    page, _ = report(tmp_path, examples=shown)
    assert re.findall(r"<header><span>(\w)</span>", page) == ["a", "b", "d", "c"]


def test_large_images_are_reduced(tmp_path):
    label = np.random.RandomState(0).randint(0, 2, (1000, 2000)).astype(np.uint8)
    image = np.random.RandomState(1).randint(0, 255, (1000, 2000, 3)).astype(np.uint8)
    page, _ = report(tmp_path, examples=[Example(image, label, label, "large", 0.5)])
    assert len(page) < 700_000


def test_many_classes_become_a_heat_map(tmp_path):
    many = named(*(f"c{index}" for index in range(60)))
    confusion = np.eye(60, dtype=np.int64) * 5
    confusion[3, 4] = 2
    page, _ = report(tmp_path, classes=many, results=[Result("x", "whole", confusion)])
    assert 'class="heat"' in page
    assert 'class="matrix"' not in page
    assert "<td>c3</td><td>c4</td>" in page


def test_absent_classes_and_predictions_that_are_no_class_are_shown(tmp_path):
    confusion = np.array([[6, 2, 1], [0, 0, 0]])
    page, parsed = report(tmp_path, results=[Result("x", "whole", confusion)])
    assert "(none)" in " ".join(parsed.text)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).replace('data-value="nan"', "")


def test_extra_tables_are_printed_as_given(tmp_path):
    table = TextTable("Adaptation", ["task", "Tent"], [["fog 5", "44.2"]], "mIoU in percent")
    text = " ".join(report(tmp_path, tables=[table])[1].text)
    for part in ("Adaptation", "Tent", "fog 5", "44.2", "mIoU in percent"):
        assert part in text


@pytest.mark.parametrize("part", ["results", "curves", "examples", "facts", "tables", "command"])
def test_any_part_may_be_empty(tmp_path, part):
    empty = {"curves": {}, "facts": {}, "command": ""}.get(part, [])
    report(tmp_path, **{part: empty})


def test_a_failed_write_leaves_the_old_report(tmp_path):
    report(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(TypeError):
        report(tmp_path, title=None, command=3, facts=None)
    assert (tmp_path / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
