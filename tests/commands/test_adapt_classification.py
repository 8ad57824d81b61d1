"""`segmill adapt` on images with one label: the digits, a tiny classifier and a tiny SiT."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from segmill.cli import main
from segmill.commands.adapt import one_step_takes
from segmill.data.image_batches import ImageBatches
from segmill.tta.counts import ImageCounts
from segmill.tta.results import TaskResult, load_task

TASKS = ("01_gaussian_noise_5", "02_fog_5")
TENT = {"methods": "[tent]", "model__generative": "null"}


def words(folder: Path, **changes: object) -> list[str]:
    """The words after `segmill adapt`; `changes` are further key=value, dots written as __."""
    settings = {
        "data": "digits_c",
        "data__corruptions": "[gaussian_noise,fog]",
        "data__batch_size": 4,
        "model___discriminative": "resnet_tiny_digits",
        "model___generative": "sit_tiny_digits",
        "model__generative__weights": "random",
        "model__generative__network__depth": 1,
        "weights": "random",
        "trainer": "adapt_cpu",
        "limit": 10,
        "pictures": 2,
        "output_dir": folder,
        "experiment__name": "tiny",
    } | changes
    if settings.get("model__generative") == "null":
        settings = {key: each for key, each in settings.items() if "model__generative__" not in key}
        del settings["model___generative"]
    keys = {key: key.replace("___", "/").replace("__", ".") for key in settings}
    return [f"{keys[key]}={value}" for key, value in settings.items()]


def adapt(folder: Path, **changes: object) -> Path:
    assert main(["adapt", *words(folder, **changes), "--trace"]) == 0
    return folder / str(changes.get("experiment__name", "tiny"))


def results(run: Path, row: str, tasks: tuple[str, ...] = TASKS) -> list[TaskResult]:
    found = [load_task(run / row, task) for task in tasks]
    return [each for each in found if each is not None]


def test_methods_with_and_without_a_guide_leave_a_comparison(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"model__loss__topk": 4, "model__loss__classes_threshold": 6}
    with caplog.at_level("INFO", logger="segmill"):
        run = adapt(tmp_path, methods="[tent,dusa]", trainer__accumulate=2, **settings)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "effective batch 8 (4 a batch x 2 accumulated)" in said
    assert re.search(r"dusa  02_fog_5  10/10  top1 \d+\.\d\d  top5 .*  ece .*  loss \d", said)

    source, *_ = results(run, "source")
    assert isinstance(source.counts, ImageCounts)
    assert len(source.names) == 10
    assert len(set(source.names)) == 10
    content = json.loads((run / "results.json").read_text())
    assert [each["method"] for each in content["methods"]] == ["source", "tent", "dusa"]
    for each in content["methods"]:
        tasks = results(run, each["method"])
        assert each["mean"]["top1"] == np.mean([task.score for task in tasks])
        assert [task.names for task in tasks] == [source.names] * 2
    with (run / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["ece"]) == source.scores["ece"]
    with (run / "dusa" / "metrics.csv").open(encoding="utf-8") as file:
        header = file.readline().strip().split(",")
    assert {f"tta/{TASKS[1]}/{key}" for key in ("top1", "top5", "ece", "loss")} <= set(header)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>truth: ") == 2
    assert "effective batch 8" in page


def test_a_guide_of_other_classes_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["adapt", *words(tmp_path, model__generative__network__num_classes=12)]) == 2
    assert "model.generative knows 12 classes and data=digits_c has 10" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_guides_file_that_is_no_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "guide.pt"
    file.write_text("not a checkpoint")
    assert main(["adapt", *words(tmp_path, model__generative__weights=file)]) == 2
    assert f"{file} is no known checkpoint" in capsys.readouterr().err


def test_a_task_that_is_shorter_than_a_step_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its table would show the source twice."""
    few = {**TENT, "limit": 4, "pictures": 0, "methods": "[tent]"}
    with caplog.at_level("WARNING", logger="segmill"):
        adapt(tmp_path, **few, data__corruptions="[fog]")
    (said,) = (each.getMessage() for each in caplog.records if "no prediction" in each.getMessage())
    assert said.startswith("tent: a task has 4 images and an optimizer step takes 4")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_task_of_one_step_is_known_for_any_number_of_processes(processes: int) -> None:
    for images in range(processes, 20):
        batches = ImageBatches(count=images, batch_size=4, place=lambda: (0, processes))
        one = one_step_takes(images, batch=4 * processes, processes=processes)
        assert one == (len(batches) == 1), images


def test_a_method_that_only_looks_on_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two tasks of four images: eight in a row are enough, four after each reset are not."""
    few = {**TENT, "limit": 4, "pictures": 0}
    fisher = "tta: eata_fisher, tta.method.fisher.images"
    rows = f"{{a: {{{fisher}: 4}}, b: {{{fisher}: 4, tta.continual: true}}, c: {{{fisher}: 2}}}}"
    with caplog.at_level("WARNING", logger="segmill"):
        adapt(tmp_path, **few | {"methods": rows})
    (said,) = (each.getMessage() for each in caplog.records if "looks on" in each.getMessage())
    assert said.startswith("a learns nothing: it only looks on for 4 images")


@pytest.mark.slow
def test_settings_are_those_of_segmentation(tmp_path: Path) -> None:
    limit = {"limit": 8, **TENT, "pictures": 0, "optimizer__learning_rate": 0.1}
    reset = results(adapt(tmp_path, **limit), "tent")
    onward = results(adapt(tmp_path, **limit, experiment__name="on", tta__continual="true"), "tent")
    after = results(adapt(tmp_path, **limit, experiment__name="a", tta__predict="after"), "tent")
    assert reset[0].loss == onward[0].loss == after[0].loss
    assert reset[1].loss != onward[1].loss
    assert confidence(reset[0]) != confidence(after[0])
    mixed = adapt(tmp_path, **limit, experiment__name="mixed", tta__mixed="true")
    (stream,) = results(mixed, "tent", ("01_mixed_0",))
    assert sorted(stream.names) == sorted(2 * reset[0].names)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    run = adapt(tmp_path, **TENT)
    before, table = results(run, "tent"), (run / "results.json").read_text()
    (run / "tent" / "tasks" / f"{TASKS[1]}.npz").unlink()
    assert main(["adapt", f"resume={run}", "--trace"]) == 0
    after = results(run, "tent")
    assert confidence(after[1]) == confidence(before[1])
    assert means(table) == means((run / "results.json").read_text())


@pytest.mark.slow
def test_a_trial_is_one_step_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="segmill"):
        adapt(tmp_path, **TENT, trainer__fast_dev_run="true")
    assert "tent  01_gaussian_noise_5  4/4" in caplog.text
    assert list(tmp_path.iterdir()) == []


def confidence(result: TaskResult) -> list[float]:
    assert isinstance(result.counts, ImageCounts)
    return result.counts.confidence.tolist()


def means(text: str) -> list[dict[str, float]]:
    return [each["mean"] for each in json.loads(text)["methods"]]
