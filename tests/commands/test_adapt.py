"""`segmill adapt` from its words to its results, on one process."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segmill.cli import main
from segmill.commands import adapt
from segmill.commands.adapt_parts import AdaptParts, build_adapt_parts
from segmill.configuration import build, compose, plain
from segmill.data.classes import read_classes
from segmill.metrics import SCALARS
from segmill.segmenter import Segmenter, save_segmenter
from segmill.tta.module import TTAModule
from tiny_adaptation import TASKS, adapt_tiny, results_of, tiny_adapt_words

# Every image changes what comes after it, also one in which all pixels are of one class.
FAST = {"optimizer__learning_rate": "1e-3", "model__loss__topk": 3}


class Kept:
    """The parts of every adaptation in this process, and the weights that it began with."""

    def __init__(self) -> None:
        self.parts: list[AdaptParts] = []
        self.sources: list[dict[str, Tensor]] = []

    def build(self, config: Any) -> AdaptParts:
        parts = build_adapt_parts(config)
        self.parts.append(parts)
        self.sources.append(weights_of(parts.model.discriminative))
        return parts


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept()
    monkeypatch.setattr(adapt, "build_adapt_parts", kept.build)
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with a line of the log for every image."""
    folder = tmp_path_factory.mktemp("finished")
    return adapt_tiny(folder, methods="[bn,tent,dusa]", trainer__log_every=1, **FAST)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in module.state_dict().items()}


def assert_same(one: Path, other: Path, row: str, tasks: tuple[str, ...] = TASKS) -> None:
    for a, b in zip(results_of(one, row, tasks), results_of(other, row, tasks), strict=True):
        assert a.names == b.names
        assert a.loss == b.loss
        np.testing.assert_array_equal(a.counts.areas, b.counts.areas)
        np.testing.assert_array_equal(a.counts.confusion, b.counts.confusion)


def test_a_run_leaves_everything_that_says_what_it_was(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    of_a_run = {"config.yaml", "command.txt", "commit.txt", "environment.txt"}
    assert names >= of_a_run | {"results.json", "results.csv", "report.html", "pictures"}
    for row in ("source", "bn", "tent", "dusa"):
        own = {path.name for path in (finished / row).iterdir()}
        assert own >= {"config.yaml", "metrics.csv", "tasks"}
    assert "segmill.tta.dusa.Dusa" in (finished / "dusa" / "config.yaml").read_text()
    text = (finished / "report.html").read_text()
    assert all(row in text for row in ("source", "tent", "dusa"))


def test_all_rows_saw_the_same_images_in_one_shuffled_order(finished: Path) -> None:
    facts = json.loads((finished / "results.json").read_text())
    (order,) = {each["order"] for each in facts["methods"]}
    assert len(order) == 12
    names = {each.names for row in ("source", "dusa") for each in results_of(finished, row)}
    assert len(names) == 1


def metrics(run: Path, row: str) -> list[dict[str, str]]:
    with (run / row / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_metrics_of_every_task_have_its_name_and_its_own_axis(finished: Path) -> None:
    rows = metrics(finished, "dusa")
    for task in TASKS:
        found = [each for each in rows if each[f"tta/{task}/mIoU"]]
        assert [float(each[f"tta/{task}/image"]) for each in found] == [1, 2, 3]
        assert all(float(each[f"tta/{task}/loss"]) > 0 for each in found)
    assert [int(each["step"]) for each in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert all(rows[-1][f"tta/{name}"] for name in SCALARS)


def test_the_running_miou_is_that_of_the_summed_confusion_matrix(finished: Path) -> None:
    for row in ("source", "tent", "dusa"):
        for result in results_of(finished, row):
            hits, label, pred = np.cumsum(result.counts.areas, axis=0).transpose(1, 0, 2)
            with np.errstate(invalid="ignore"):
                expected = np.nanmean(hits / (label + pred - hits), axis=1)
            found = [
                float(each[key]) for each in metrics(finished, row) if each[key := name(result)]
            ]
            np.testing.assert_allclose(found, expected, rtol=1e-12)  # float64, another order


def name(result: Any) -> str:
    return f"tta/{result.task}/mIoU"


@pytest.mark.parametrize("continual", ["false", "true"])
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, kept: Kept, continual: str) -> None:
    keys = {"tta__continual": continual, **FAST, "pictures": 0}
    runs = [adapt_tiny(tmp_path, experiment__name=each, **keys) for each in ("a", "b")]
    assert_same(*runs, "dusa")
    one, other = (weights_of(parts.model) for parts in kept.parts)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    source = kept.sources[0]
    assert any(not torch.equal(one[f"discriminative.{key}"], source[key]) for key in source)


def test_another_seed_shows_the_images_in_another_order(tmp_path: Path) -> None:
    keys = {"methods": "[]", "data__generate__test": 6, "pictures": 0}
    runs = [adapt_tiny(tmp_path, seed=each, experiment__name=f"s{each}", **keys) for each in (0, 1)]
    (first, *_), (other, *_) = (results_of(run, "source") for run in runs)
    assert first.names != other.names
    assert sorted(first.names) == sorted(other.names)
    np.testing.assert_array_equal(first.counts.confusion, other.counts.confusion)


def test_a_task_after_another_is_as_a_fresh_run_unless_it_is_continual(tmp_path: Path) -> None:
    keys = {"methods": "[tent,dusa]", **FAST, "pictures": 0}
    both = adapt_tiny(tmp_path, experiment__name="both", **keys)
    alone = adapt_tiny(tmp_path, experiment__name="alone", tasks="[2]", **keys)
    carried = adapt_tiny(tmp_path, experiment__name="carried", tta__continual="true", **keys)
    for row in ("tent", "dusa"):
        assert_same(both, alone, row, TASKS[1:])
        assert_same(both, carried, row, TASKS[:1])
        assert results_of(both, row)[1].loss != results_of(carried, row)[1].loss


def test_without_a_guide_scores_are_those_of_segmill_eval(tmp_path: Path, kept: Kept) -> None:
    weights = tmp_path / "model.safetensors"
    config = compose("train", ["model=segformer_tiny", "data=scenes", "data.channels=3"])
    torch.manual_seed(0)
    model = build(config.model).eval()
    protocol = build(config.protocol)
    save_segmenter(weights, Segmenter(model, read_classes("scenes"), protocol, plain(config.model)))
    keys = {"run": weights, "tta__forward_mode": "discriminative_only", "pictures": 0}
    words = tiny_adapt_words(tmp_path, **keys)
    brought = ("weights=", "model/discriminative=")
    assert main(["adapt", *(each for each in words if not each.startswith(brought))]) == 0

    (parts,) = kept.parts
    assert parts.model.generative is None
    assert not list((tmp_path / "runs").glob("tiny/dusa"))
    after = weights_of(parts.model.discriminative)
    assert all(torch.equal(after[key], each) for key, each in kept.sources[0].items())

    here = [f"data.data_root={tmp_path / 'scenes'}", f"out={tmp_path / 'files'}"]
    made = ["data=scenes_c", "data.generate=null", "data.corruptions=[contrast]", "workers=1"]
    assert main(["corrupt", *made, *here]) == 0
    words = ["data=scenes", f"data.data_root={tmp_path / 'files'}", "data.generate=null"]
    pattern = "data.image='scenes-c/contrast/5/{split}/{name}.png'"
    words += [pattern, "data.channels=3", "split=test", "trainer=cpu", f"run={weights}"]
    assert main(["eval", *words]) == 0
    scored = json.loads((tmp_path / "eval_scenes_test_whole" / "metrics.json").read_text())
    adapted = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())
    (source,) = adapted["methods"]
    contrast = source["tasks"][1]
    assert contrast["corruption"] == "contrast"
    assert {key: contrast[key] for key in SCALARS} == scored["scores"]
    assert contrast["IoU"] == list(scored["IoU"].values())


@pytest.fixture
def sigint() -> Iterator[None]:
    """Lightning leaves Ctrl-C switched off when it was pressed."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_in(monkeypatch: pytest.MonkeyPatch, *, method: str, task: str, image: int) -> None:
    """Ctrl-C at this image."""
    step = TTAModule.training_step

    def interrupted(self: TTAModule, batch: dict[str, Any], batch_idx: int) -> None:
        assert self.task is not None
        here = (type(self.method).__name__, self.task.name, batch_idx)
        if here == (method, task, image):
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    monkeypatch.setattr(TTAModule, "training_step", interrupted)


@pytest.mark.parametrize("continual", ["false", "true"])
def test_an_interrupted_run_goes_on_and_ends_as_one_without_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sigint: None, continual: str
) -> None:
    rows = f"{{tent: {{tta: tent, tta.continual: {continual}}}, dusa: {{tta: dusa}}}}"
    keys = {"methods": rows, **FAST, "trainer__log_every": 1}
    whole = adapt_tiny(tmp_path, experiment__name="whole", **keys)
    interrupt_in(monkeypatch, method="Tent", task=TASKS[1], image=1)
    assert main(["adapt", *tiny_adapt_words(tmp_path, experiment__name="broken", **keys)]) == 130
    monkeypatch.undo()
    broken = tmp_path / "runs" / "broken"
    finished = {path.stem for path in broken.rglob("*.npz")}
    assert finished == set(TASKS)  # both of the source, one of tent
    assert not (broken / "results.json").exists()

    begun: list[tuple[str, str]] = []
    step = TTAModule.on_train_start

    def note(self: TTAModule) -> None:
        assert self.task is not None
        begun.append((type(self.method).__name__, self.task.name))
        step(self)

    monkeypatch.setattr(TTAModule, "on_train_start", note)
    assert main(["adapt", f"resume={broken}", "--trace"]) == 0
    left = TASKS if continual == "true" else TASKS[1:]
    assert begun == [*(("Tent", task) for task in left), *(("Dusa", task) for task in TASKS)]
    for row in ("source", "tent", "dusa"):
        assert_same(whole, broken, row)
    same = [json.loads((run / "results.json").read_text()) for run in (whole, broken)]
    for each in (method for run in same for method in run["methods"]):
        for measured in (each, *each["tasks"]):
            del measured["seconds_per_image"]
    assert same[0] == same[1]
    assert len(list((broken / "tent").glob("metrics*.csv"))) == 2, "the first part is kept"


def test_a_finished_run_can_be_resumed_for_its_report(finished: Path) -> None:
    before = (finished / "results.json").read_text()
    (finished / "report.html").unlink()
    assert main(["adapt", f"resume={finished}", "--trace"]) == 0
    assert (finished / "report.html").is_file()
    assert (finished / "results.json").read_text() == before


def test_several_epochs_score_the_last_one_and_steps_only_grow(tmp_path: Path) -> None:
    keys = {"tta__max_epochs": 2, "trainer__log_every": 1, "pictures": 0}
    run = adapt_tiny(tmp_path, **FAST, **keys)
    once = adapt_tiny(tmp_path, experiment__name="once", **FAST, pictures=0)
    steps = [int(each["step"]) for each in metrics(run, "dusa")]
    assert steps == [*range(1, 13), 12]
    for twice, single in zip(results_of(run, "dusa"), results_of(once, "dusa"), strict=True):
        assert len(twice.names) == 3
        assert twice.loss != single.loss
    assert_same(run, once, "source")


def test_mixed_is_one_stream_of_all_tasks_and_one_column(tmp_path: Path) -> None:
    keys = {"tta__mixed": "true", "methods": "[tent,dusa]", "pictures": 3}
    run = adapt_tiny(tmp_path, **keys)
    for row in ("source", "tent", "dusa"):
        (result,) = results_of(run, row, ("01_mixed_0",))
        assert len(result.names) == 6
        assert len(set(result.names)) == 3
    assert "mixed" in (run / "report.html").read_text()
    shown = {path.stem for path in (run / "tent" / "pictures").iterdir()}
    assert shown == {"01_mixed_0_5", "01_mixed_0_4", "01_mixed_0_3"}, "the last of the stream"


def test_wandb_keeps_a_run_for_every_method_offline(tmp_path: Path) -> None:
    keys = {"logging": "wandb", "logging__wandb__mode": "offline", "logging__wandb__entity": "me"}
    run = adapt_tiny(tmp_path, methods="[bn]", limit=1, pictures=0, **keys)
    for row in ("source", "bn"):
        (kept,) = (run / row / "wandb").glob("offline-run-*/*.wandb")
        text = kept.read_bytes()
        assert b"tta/01_gaussian_noise_5/image" in text
        assert b"tta/tasks" in text


def test_fast_dev_run_takes_one_image_through_every_method_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images: list[str] = []
    step = TTAModule.training_step

    def note(self: TTAModule, batch: dict[str, Any], batch_idx: int) -> None:
        images.append(type(self.method).__name__)
        step(self, batch, batch_idx)

    monkeypatch.setattr(TTAModule, "training_step", note)
    words = tiny_adapt_words(tmp_path, methods="[tent,dusa]", trainer__fast_dev_run="true")
    assert main(["adapt", *words, "--trace"]) == 0
    assert images == ["Source", "Tent", "Dusa"]
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
