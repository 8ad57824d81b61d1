"""The rows of a comparison: what reaches which, and what is refused before anything starts."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from segmill.cli import main
from segmill.commands.adapt_rows import Row, rows_of
from segmill.configuration import Invocation, build, compose
from segmill.errors import SegmillError
from segmill.tta.results import load_task
from tiny_adaptation import adapt_tiny, tiny_adapt_words

LIST = "methods=[bn,tent,dusa]"
MAPPING = (
    "methods={careful: {tta: tent, optimizer.learning_rate: 1e-6, optimizer.rules: {head: "
    "{lr_mult: 2.0}}}, on_bn: {tta: dusa, tta.batch_statistics: true, model.loss.topk: 5, "
    "model.update.generative: false, optimizer.norm_decay_mult: null, tta.predict: after}}"
)


def rows(*typed: str) -> dict[str, Row]:
    words = ("data=scenes_c", *typed)
    context = Invocation(verb="adapt", argv=(), command="", overrides=words, dry_run=False)
    return rows_of(compose("adapt", words), context)


def target(row: Row) -> str:
    return str(row.config.tta.method["_target_"]).rpartition(".")[2]


def refused(*typed: str) -> str:
    with pytest.raises(SegmillError) as error:
        rows(*typed)
    return str(error.value)


def test_weights_beside_the_run_of_an_experiment_are_refused() -> None:
    assert "has run=runs/digits_classifier" in refused("experiment=digits_c", "weights=random")


def test_without_methods_there_are_the_source_and_the_chosen_one() -> None:
    found = rows("tta=tent")
    assert {name: target(row) for name, row in found.items()} == {
        "source": "Source",
        "tent": "Tent",
    }


@pytest.mark.parametrize("methods", ["methods=tent", "methods=[tent]", "methods=[source,tent]"])
def test_the_source_is_there_once_and_first(methods: str) -> None:
    assert list(rows(methods)) == ["source", "tent"]


def test_every_row_of_a_list_has_its_own_files_settings() -> None:
    found = rows(LIST)
    assert [target(row) for row in found.values()] == ["Source", "BN", "Tent", "Dusa"]
    assert found["bn"].tta.batch_statistics
    assert not found["dusa"].tta.batch_statistics
    assert found["bn"].config.optimizer is None
    assert found["tent"].config.optimizer.learning_rate == 2.5e-4
    assert found["dusa"].config.optimizer.learning_rate == 1e-5


def test_rows_of_a_mapping_differ_from_their_files_as_it_says() -> None:
    found = rows(MAPPING)
    careful, on_bn = found["careful"].config, found["on_bn"].config
    assert list(found) == ["source", "careful", "on_bn"]
    assert careful.optimizer.learning_rate == 1e-6
    assert careful.optimizer.rules == {"head": {"lr_mult": 2.0}}
    assert careful.model.loss.topk == 1
    assert found["on_bn"].tta.batch_statistics
    assert found["on_bn"].tta.predict == "after"
    assert not on_bn.model["update"].generative
    assert on_bn.model.loss.topk == 5
    assert on_bn.optimizer.norm_decay_mult is None
    assert build(on_bn.optimizer).learning_rate == 1e-5


def test_what_is_typed_counts_in_every_row_that_learns() -> None:
    typed = ("optimizer.learning_rate=3e-4", "tta.batch_statistics=true", "tta.continual=true")
    found = rows("methods=[bn,tent,dusa,source]", *typed, "model.loss.topk=4")
    for name in ("tent", "dusa"):
        assert found[name].config.optimizer.learning_rate == 3e-4
        assert found[name].tta.batch_statistics
    assert all(row.tta.continual and row.config.model.loss.topk == 4 for row in found.values())
    assert not found["source"].tta.batch_statistics, "the source stays as it was trained"
    assert found["source"].config.optimizer is None
    assert found["bn"].config.optimizer is None


def test_discriminative_only_leaves_the_source_alone() -> None:
    assert list(rows(LIST, "tta.forward_mode=discriminative_only")) == ["source"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["methods=[tnt]"], "did you mean tent?"),
        (["methods=[xyz]"], "there are bn, cotta"),
        (["methods={a: {tta: tent, data.seed: 1}}"], "methods.a.data.seed: rows share the data"),
        (["methods={a: {tta: tent, weights: x}}"], "methods.a.weights"),
        (["methods={a: {tta: tent, optimizer: {learning_rate: 1}}}"], "written in full"),
        (["methods={a: {optimizer.learning_rate: 0.5}}"], "the method first"),
        (["methods={a: tent}"], "methods.a='tent' should be settings"),
        (["methods={a/b: {tta: tent}}"], "a/b: a row's results lie in a folder"),
        (["methods={pictures: {tta: tent}}"], "not be pictures or evidence"),
        (["methods={results.json: {tta: tent}}"], "results.json: a row's results lie in a folder"),
        (["methods={..: {tta: tent}}"], "not begin with '.'"),
        (["methods={source: {tta: tent}}"], "the model as it was trained"),
        (["methods={a: {tta: tent, tta.mixed: true}}"], "methods.a.tta.mixed: this is one setting"),
        (["methods={a: {tta: tent, tta.forward_mode: tta}}"], "one setting for all rows"),
        (["methods={a: {tta: tent, optimizer.betas: [1, 2]}}"], "methods: a: optimizer.betas"),
        (["methods={a: {tta: tent, tta.predict: now}}"], "methods: a: tta.predict='now'"),
        ([LIST, "optimizer.betas=[0.9,0.99]"], "methods: tent: optimizer.betas: there is no such"),
        (["methods=[bn]", "optimizer.learning_rate=1"], "no row takes it"),
        (["tta=source", "tta.batch_statistics=true"], "no row takes it"),
        ([LIST, "tta=tent"], "only methods would count"),
        (["run=x", "weights=y"], "only run would count"),
        (["run=x", "model/discriminative=fcn_tiny"], "only run would count"),
        (["tta.max_epochs=0"], "tta.max_epochs=0 should be 1 or more"),
        (["tta.max_epochs=two"], "tta.max_epochs='two'"),
        (["tta.predict=never"], "'before' or 'after'"),
        (["tta.forward_mode=both"], "'tta' or 'discriminative_only'"),
        (["tta.mixed=true", "tta.continual=true"], "Choose one of them"),
        (["model=segformer_tiny"], "did you mean model/discriminative=segformer_tiny?"),
        (["tta.continuous=true"], "did you mean tta.continual?"),
    ],
)
def test_a_wrong_row_is_one_paragraph(typed: Sequence[str], said: str) -> None:
    message = refused(*typed)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__loss__topk": 99}, "methods: dusa: model.loss.topk=99"),
        (
            {"methods": "[sar,dusa]", "model__generative": "null"},
            "methods: dusa: This method needs",
        ),
        ({"tta": "tent", "optimizer": "null"}, "methods: tent: tta=tent needs an optimizer"),
        ({"tta": "sar", "tta__method__frozen_share": 2.0}, "methods: sar: tta.method.frozen_share"),
        ({"limit": 0}, "limit=0"),
        ({"weights": "none.pth"}, "weights=none.pth does not exist"),
        ({"trainer__devices": 0}, "trainer.devices=0"),
        ({"trainer__devices": "[0,1]"}, "on the CPU this is the number of processes"),
        ({"trainer__cuda_graphs": "true"}, "trainer.cuda_graphs=true is for GPUs"),
        ({"trainer__precision": "16-mixed"}, "'32-true' or 'bf16-mixed'"),
        ({"protocol": "slide"}, "Set protocol=whole"),
        ({"tasks": "[3]"}, "numbered from 1 to 2"),
        ({"tasks": "[2]", "tta__mixed": "true"}, "a task depends on the others"),
        (
            {"tasks": "[2]", "methods": "{on: {tta: tent, tta.continual: true}}"},
            "methods: on: tasks: with tta.continual",
        ),
        ({"data__corruptions": "[gaussian_noize]"}, "gaussian_noise"),
    ],
)
def test_what_a_row_would_stop_at_is_refused_before_the_first_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str
) -> None:
    assert main(["adapt", *tiny_adapt_words(tmp_path, **changes)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["adapt", *tiny_adapt_words(tmp_path, trainer__accelerator="gpu")]) == 2
    assert "trainer=adapt_cpu" in capsys.readouterr().err


def test_more_gpus_than_there_are_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for devices in ("3", "[0,2]", "[]"):
        keys = {"trainer": "adapt", "trainer__devices": devices}
        assert main(["adapt", *tiny_adapt_words(tmp_path, **keys)]) == 2
        assert "2 GPUs are visible" in capsys.readouterr().err


def test_sharded_weights_are_not_recorded_as_cuda_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    keys = {"trainer": "adapt", "trainer__devices": "2", "trainer__cuda_graphs": "true"}
    assert main(["adapt", *tiny_adapt_words(tmp_path, **keys)]) == 2
    assert "needs whole weights on every GPU" in capsys.readouterr().err


def test_resume_takes_nothing_else_and_no_other_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", f"resume={tmp_path}", "seed=1"]) == 2
    assert "seed=1 would make it another one" in capsys.readouterr().err
    assert main(["adapt", f"resume={tmp_path}"]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("model: {}\n")
    assert main(["adapt", f"resume={tmp_path}"]) == 2
    assert "no run folder of a segmill adapt" in capsys.readouterr().err


def test_rows_with_settings_of_their_own_run_side_by_side(tmp_path: Path) -> None:
    rows = (
        "{t: {tta: tent, tta.continual: true, optimizer.learning_rate: 1e-2}, t2: {tta: tent, "
        "optimizer.learning_rate: 1e-2}, d: {tta: dusa, model.update.discriminative: false}}"
    )
    run = adapt_tiny(tmp_path, methods=rows, limit=2, pictures=0)
    first, second = "01_gaussian_noise_5", "02_contrast_5"
    losses = {
        (row, task): result.loss
        for row in ("t", "t2", "d")
        for task in (first, second)
        if (result := load_task(run / row, task)) is not None
    }
    assert len(losses) == 6
    assert losses["t", first] == losses["t2", first]
    assert losses["t", second] != losses["t2", second]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "t: continual; predictions from before the update; t2, d: reset for every task" in page


def test_a_run_is_named_after_what_it_compares(tmp_path: Path) -> None:
    keys = {"experiment__name": "null", "limit": 1, "pictures": 0}
    for methods in ("[]", "[bn]", "[bn,tent]"):
        words = tiny_adapt_words(tmp_path, methods=methods, **keys)
        assert main(["adapt", *words]) == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    end = "scenes_c_seed0"
    assert names == {f"adapt_{each}_{end}" for each in ("source", "bn", "comparison")}
