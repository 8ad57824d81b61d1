"""A process without torch trains DFormer-Tiny on generated rooms, goes on, scores and predicts."""

import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

jt = pytest.importorskip("jittor")

from segmill import cli
from segmill.checkpoint.read import read_checkpoint, read_metadata
from segmill.checkpoint.training_state import read_training_state
from segmill.checkpoint.write_safetensors import write_safetensors
from segmill.jittor.training import Training

pytestmark = [pytest.mark.jittor, pytest.mark.timeout(1500)]
ROOMS = {"train": 8, "val": 2, "test": 2}
RUN = (
    "runtime=jittor",
    "data=scenes",
    "model=dformer-tiny",
    "trainer=cpu",
    "data.batch_size=2",
    "schedule.warmup_steps=0",
    "schedule.power=0.0",  # a rate that does not depend on the number of steps
    "trainer.log_every=1",
    "trainer.val_every=2",
)


def train(folder: Path, name: str, *more: str, rooms: Path) -> int:
    sizes = [f"data.generate.{split}={count}" for split, count in ROOMS.items()]
    where = [f"data.data_root={rooms}", f"output_dir={folder}", f"experiment.name={name}"]
    return cli.main(["train", *RUN, *sizes, *where, *more])


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rooms") / "scenes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rooms: Path) -> Path:
    """Two runs of four steps: one in one go, one in two halves."""
    runs = tmp_path_factory.mktemp("runs")
    assert train(runs, "whole", "trainer.max_steps=4", rooms=rooms) == 0
    assert train(runs, "halves", "trainer.max_steps=2", rooms=rooms) == 0
    go_on = ("train", "runtime=jittor", f"resume={runs / 'halves'}", "trainer.max_steps=4")
    assert cli.main(list(go_on)) == 0
    return runs


def test_torch_is_not_there():
    assert find_spec("torch") is None
    assert find_spec("lightning") is None


def test_two_halves_are_the_whole_bit_for_bit(folder: Path):
    whole, halves = (
        read_training_state(folder / name / "last.pkl") for name in ("whole", "halves")
    )
    assert whole.step == halves.step == 4
    for name, value in whole.weights.items():
        assert np.array_equal(value, halves.weights[name]), name
    for name, value in whole.exp_avg_sq.items():
        assert np.array_equal(value, halves.exp_avg_sq[name]), name


def test_the_run_folder_is_that_of_torch(folder: Path):
    names = {path.name for path in (folder / "whole").iterdir()}
    recorded = {"config.yaml", "command.txt", "environment.txt", "commit.txt", "metrics.csv"}
    assert recorded <= names
    assert {"metrics.json", "confusion.npy", "report.html", "model.safetensors"} <= names
    header, *rows = (folder / "whole" / "metrics.csv").read_text().splitlines()
    assert {"step", "train/loss", "train/lr", "val/mIoU", "val/IoU/wall"} <= set(header.split(","))
    assert len(rows) == 6  # four steps, two validations


def test_evaluation_under_another_protocol_leaves_its_stamp(folder: Path):
    run = folder / "whole"
    line = ["eval", "runtime=jittor", f"run={run}", "split=test", "protocol.flip=true"]
    assert cli.main(line) == 0
    facts = json.loads((run / "eval_scenes_test_whole" / "metrics.json").read_text())
    assert facts["protocol"]["flip"] is True
    assert facts["images"] == ROOMS["test"]


def test_prediction_writes_an_overlay(folder: Path, rooms: Path, tmp_path: Path):
    image = sorted((rooms / "images" / "test").glob("*.png"))[0]
    depth = rooms / "depth" / "test" / image.name
    line = ["predict", "runtime=jittor", f"run={folder / 'whole'}", str(image), f"depth={depth}"]
    assert cli.main([*line, f"output_dir={tmp_path}"]) == 0
    assert [path.suffix for path in (tmp_path / "overlay").iterdir()]


def test_jittors_own_load_opens_what_is_written(folder: Path):
    best = jt.load(str(folder / "whole" / "best.pkl"))
    last = jt.load(str(folder / "whole" / "last.pkl"))
    ours = read_checkpoint(folder / "whole" / "best.pkl")
    name = "decode_head.conv_seg.weight"
    assert np.array_equal(best[name].numpy(), ours[name])
    assert set(last["state_dict"]) == set(ours)


def test_a_state_that_is_cut_short_is_refused_before_anything_is_touched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "cut"
    run.mkdir()
    whole = folder / "whole"
    (run / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    (run / "last.pkl").write_bytes((whole / "last.pkl").read_bytes()[:-4000])
    assert cli.main(["train", "runtime=jittor", f"resume={run}"]) == 2
    assert "last.pkl" in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} == {"config.yaml", "last.pkl"}


def test_a_run_of_a_model_that_only_torch_has_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = folder / "whole" / "model.safetensors"
    description = json.loads(read_metadata(whole)["segmill"])
    description["model"]["network"]["_target_"] = "segmill.models.families.fcn.FCN"
    path = tmp_path / "model.safetensors"
    write_safetensors(path, read_checkpoint(whole), {"segmill": json.dumps(description)})
    assert cli.main(["eval", "runtime=jittor", f"run={path}", "data=scenes"]) == 2
    assert "runtime=jittor has no segmill.models.families.fcn.FCN" in capsys.readouterr().err


def test_an_evaluation_refuses_what_it_would_ignore(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["eval", "runtime=jittor", f"run={folder / 'whole'}", "trainer.precision=bf16-mixed"]
    assert cli.main(line) == 2
    assert "trainer.precision=bf16-mixed has no effect" in capsys.readouterr().err


def test_weights_alone_are_no_resume_point(folder: Path, capsys: pytest.CaptureFixture[str]):
    line = ["train", "runtime=jittor", f"resume={folder / 'whole' / 'best.pkl'}"]
    assert cli.main(line) == 2
    assert "holds weights only" in capsys.readouterr().err


@pytest.mark.parametrize(("presses", "step"), [(1, 1), (2, None)])
def test_an_interrupt_waits_for_the_step_and_writes_a_state_to_go_on_from(
    presses: int, step: int | None, rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    take_step = Training.take_step

    def interrupted(training: Training, batch):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(training, batch)

    monkeypatch.setattr(Training, "take_step", interrupted)
    words = ("stopped", "trainer.max_steps=4")
    if step is None:
        with pytest.raises(SystemExit):
            train(tmp_path, *words, rooms=rooms)
        assert not (tmp_path / "stopped" / "last.pkl").exists()
    else:
        assert train(tmp_path, *words, rooms=rooms) == 130
        assert read_training_state(tmp_path / "stopped" / "last.pkl").step == step


def test_a_loss_that_is_not_finite_leaves_evidence(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(Training, "take_step", lambda *_: {"decode.loss_ce": float("nan")})
    assert train(tmp_path, "broken", "trainer.max_steps=4", rooms=rooms) == 2
    assert "not finite" in capsys.readouterr().err
    assert (tmp_path / "broken" / "evidence" / "evidence.json").is_file()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.ema=0.9", r"trainer.ema=0.9 has no effect with runtime=jittor"),
        ("trainer.devices=2", r"works in one process"),
        ("logging=tensorboard", r"logging.tensorboard=true"),
        ("model=fcn_tiny", r"runtime=jittor has no"),
        ("optim=sgd_poly_40k", r"runtime=jittor has no segmill.optim.SGD"),
        ("data=digits", r"runtime=jittor has no segmill.data.image_datamodule.ImageData"),
        ("weights=nvidia/mit-b0", r"takes nothing from the hub or timm"),
        ("data.train_split=none", r"none"),
    ],
)
def test_what_this_runtime_lacks_is_refused_by_name(
    override: str, said: str, rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(tmp_path, "x", "trainer.max_steps=1", override, rooms=rooms) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_one_step_of_a_trial_run_writes_nothing(rooms: Path, tmp_path: Path):
    assert (
        train(tmp_path, "x", "trainer.fast_dev_run=true", "trainer.max_steps=4", rooms=rooms) == 0
    )
    assert not list(tmp_path.iterdir())
