import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import segmill
from segmill.cli import main
from segmill.training import SegmentationModule
from tiny_run import tiny_overrides, train_tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of six steps."""
    return train_tiny(tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_everything_that_says_what_it_was(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "command.txt",
        "environment.txt",
        "commit.txt",
        "metrics.csv",
        "metrics.json",
        "best.ckpt",
        "last.ckpt",
        "model.safetensors",
        "report.html",
    }
    assert "segformer_tiny" in (finished / "command.txt").read_text()


def test_scores_carry_the_protocol_they_were_made_under(finished: Path) -> None:
    facts = json.loads((finished / "metrics.json").read_text())
    assert facts["protocol"]["name"] == "whole"
    assert facts["split"] == "val"
    assert facts["images"] == 3
    assert 0.0 <= facts["scores"]["mIoU"] <= 1.0


def test_the_model_file_alone_predicts_what_the_run_predicted(finished: Path) -> None:
    segmenter = segmill.load(finished / "model.safetensors")
    image = finished.parents[1] / "scenes" / "images" / "val"
    result = segmenter.predict(sorted(image.iterdir())[0])
    assert result.label.shape == (32, 48)
    assert result.overlay().shape == (32, 48, 3)
    assert segmenter.classes.names[0] == "wall"


def test_a_second_run_of_the_same_name_gets_its_own_folder(tmp_path: Path) -> None:
    train_tiny(tmp_path, trainer__max_steps=1, trainer__val_every=1)
    train_tiny(tmp_path, trainer__max_steps=1, trainer__val_every=1)
    assert (tmp_path / "runs" / "tiny-2" / "metrics.json").is_file()


def test_three_steps_and_three_more_equal_six_bit_for_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _state(finished)
    step = SegmentationModule.training_step

    def fails_in_the_fifth(self: SegmentationModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.global_step == 4:
            raise RuntimeError("the machine goes down")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", fails_in_the_fifth)
    assert main(["train", *tiny_overrides(tmp_path)]) == 1
    monkeypatch.undo()
    broken = tmp_path / "runs" / "tiny"
    assert torch.load(broken / "last.ckpt", weights_only=True)["global_step"] == 3
    assert main(["train", f"resume={broken}", "--trace"]) == 0
    resumed = _state(broken)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_the_curve_of_a_resumed_run_has_both_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SegmentationModule.training_step

    def fails_in_the_fifth(self: SegmentationModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.global_step == 4:
            raise RuntimeError("the machine goes down")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", fails_in_the_fifth)
    main(["train", *tiny_overrides(tmp_path)])
    monkeypatch.undo()
    folder = tmp_path / "runs" / "tiny"
    main(["train", f"resume={folder}"])
    parts = sorted(folder.glob("metrics*.csv"))
    assert len(parts) == 2
    assert all("train/loss" in part.read_text() for part in parts)


def test_weights_only_are_no_point_to_resume_from(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"resume={finished / 'model.safetensors'}"]) == 2
    assert "weights=" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused_before_anything_is_touched(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (finished / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    before = sorted(tmp_path.iterdir())
    assert main(["train", f"resume={tmp_path}"]) == 2
    assert "last.ckpt" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("word", ["", "model.network.decode_head.channels=8"])
def test_a_state_of_another_network_is_refused_before_anything_is_touched(
    word: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished / "last.ckpt", weights_only=True)
    if not word:
        weights = state["state_dict"].items()
        state["state_dict"] = {name.replace("model.", "net."): value for name, value in weights}
    torch.save(state, tmp_path / "last.ckpt")
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    before = sorted(tmp_path.iterdir())
    assert main(["train", f"resume={tmp_path}", *filter(None, [word])]) == 2
    assert "weights=" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_resumed_run_may_not_become_another_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", f"resume={finished}", "model=fcn_tiny"]) == 2
    assert "model=fcn_tiny" in capsys.readouterr().err


def test_the_first_non_finite_loss_stops_with_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_overrides(tmp_path, optimizer__learning_rate=1e30, schedule__warmup_factor=1.0)
    assert main(["train", *words]) == 2
    message = capsys.readouterr().err
    assert "not finite" in message
    evidence = tmp_path / "runs" / "tiny" / "evidence" / "rank0"
    facts = json.loads((evidence / "evidence.json").read_text())
    assert len(facts["images"]) == 2
    assert facts["gradient_norms"]
    assert (evidence / "00_image.png").is_file()


def test_a_dry_run_takes_one_real_step_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_overrides(tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 = 1 device(s) x 2 image(s) x 1 accumulated" in text
    assert "One step on" in text
    assert not (tmp_path / "runs").exists()


def test_averaged_weights_are_what_is_scored_and_saved(tmp_path: Path) -> None:
    folder = train_tiny(tmp_path, trainer__ema=0.5)
    saved = torch.load(folder / "best.ckpt", weights_only=True)
    averaged, current = saved["state_dict"], saved["current_model_state"]
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)


def test_accumulation_gives_the_same_number_of_optimizer_steps(tmp_path: Path) -> None:
    folder = train_tiny(tmp_path, trainer__accumulate=2)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    words = tiny_overrides(tmp_path, trainer__devices=2)
    done = subprocess.run(
        [sys.executable, "-m", "segmill", "train", *words], check=False, timeout=240
    )
    assert done.returncode == 0
    run = tmp_path / "runs" / "tiny"
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]
    together = json.loads((run / "metrics.json").read_text())
    assert main(["eval", f"run={run}", "trainer=cpu", "split=val"]) == 0
    alone = json.loads((run / "eval_scenes_val_whole" / "metrics.json").read_text())
    assert together["scores"] == alone["scores"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a child process")
def test_an_interrupted_run_writes_last_ckpt_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = tiny_overrides(tmp_path, trainer__max_steps=3000, trainer__val_every=3000)
    log = tmp_path / "log.txt"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "segmill", "train", *words],
            stdout=stream,
            stderr=stream,
            # A shell that runs the tests in the background has its children ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        metrics = tmp_path / "runs" / "tiny" / "metrics.csv"
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        child.wait(timeout=60)
    assert (tmp_path / "runs" / "tiny" / "last.ckpt").is_file()
    assert "segmill train resume=" in log.read_text()


def _state(folder: Path) -> dict[str, Tensor]:
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    state = {f"weights {name}": value for name, value in saved["state_dict"].items()}
    for index, moments in saved["optimizer_states"][0]["state"].items():
        state |= {f"moments {index} {name}": value for name, value in moments.items()}
    return state


@pytest.mark.parametrize("val_every", [4, 100])
def test_the_last_step_is_validated_whatever_val_every_is(tmp_path: Path, val_every: int) -> None:
    folder = train_tiny(tmp_path, trainer__max_steps=6, trainer__val_every=val_every)
    assert scored_steps(folder) == ([4, 6] if val_every == 4 else [6])
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert (folder / "best.ckpt").is_file()


def scored_steps(folder: Path) -> list[int]:
    """Optimizer steps done at each validation."""
    rows = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    return [int(row["step"]) + 1 for row in rows if row["val/mIoU"]]


@pytest.mark.parametrize(("accumulate", "last"), [(1, 12), (2, 9)])
def test_only_the_epochs_that_are_due_and_the_last_step_are_validated(
    tmp_path: Path, accumulate: int, last: int
) -> None:
    """Epochs of two steps: after the first, after each third, after each beyond the fourth."""
    schedule = "{_target_: segmill.validation.ValidationSchedule, epoch_steps: 2, every: 3, "
    folder = train_tiny(
        tmp_path,
        trainer__validation=f"{schedule}each_after: 4}}",
        trainer__val_every=2,
        trainer__accumulate=accumulate,
        trainer__max_steps=last,
    )
    assert scored_steps(folder) == ([2, 6, 10, 12] if last == 12 else [2, 6, 9])
    assert json.loads((folder / "metrics.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "nowhere.pth"},
        {"data__train_split": "none"},
        {"data__batch_size": 3, "trainer__accumulate": 2},
        {"trainer__val_every": 0},
        {"trainer__max_steps": 0},
        {
            "trainer__validation": "{_target_: segmill.validation.ValidationSchedule, "
            "epoch_steps: 2, every: 3, each_after: 4}"  # while val_every is 3
        },
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    assert main(["train", *tiny_overrides(tmp_path, **change)]) == 2
    assert not (tmp_path / "runs").exists()


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    assert main(["train", *tiny_overrides(tmp_path, trainer__fast_dev_run="true")]) == 0
    assert not (tmp_path / "runs").exists()
