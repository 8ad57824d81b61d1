"""The trainer's settings: world size, what is written where, no prompt of W&B."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from segmill.commands.accounts import has_wandb_key
from segmill.commands.trainer import (
    LoggingSettings,
    TrainerSettings,
    build_trainer,
    world_size,
)
from segmill.configuration import build, compose

CPU = ["data=scenes", "model=fcn_tiny_rgbd", "trainer=cpu"]


@pytest.fixture(scope="module")
def settings() -> TrainerSettings:
    return build(compose("train", CPU).trainer)


@pytest.mark.parametrize(
    ("devices", "nodes", "processes"), [(1, 1, 1), (2, 1, 2), ((0, 3), 2, 4), ("auto", 1, 1)]
)
def test_world_size_counts_devices_and_nodes(settings, devices, nodes, processes):
    assert world_size(replace(settings, devices=devices, nodes=nodes)) == processes


def test_auto_devices_are_all_gpus(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert world_size(replace(settings, accelerator="gpu", devices="auto")) == 3


def test_the_run_folder_gets_metrics_and_two_checkpoints(settings, tmp_path):
    trainer = build_trainer(settings, LoggingSettings.silent(), tmp_path, extra_callbacks=[])
    checkpoints = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]
    # `last` watches no score: it is written at every validation, however bad.
    assert [(c.filename, c.monitor) for c in checkpoints] == [("best", "val/mIoU"), ("last", None)]
    assert isinstance(trainer.logger, CSVLogger)
    assert Path(trainer.logger.log_dir) == tmp_path


def test_a_resumed_run_keeps_the_older_metrics(settings, tmp_path):
    (tmp_path / "metrics.csv").write_text("step\n")
    build_trainer(settings, LoggingSettings.silent(), tmp_path, extra_callbacks=[])
    assert (tmp_path / "metrics-1.csv").read_text() == "step\n"


def test_tensorboard_comes_beside_the_csv(settings, tmp_path):
    logging = build(compose("train", [*CPU, "logging=tensorboard"]).logging)
    trainer = build_trainer(settings, logging, tmp_path, extra_callbacks=[])
    assert [type(each) for each in trainer.loggers] == [CSVLogger, TensorBoardLogger]


def test_val_every_counts_optimizer_steps(settings, tmp_path):
    slow = replace(settings, accumulate=4, val_every=10)
    trainer = build_trainer(slow, LoggingSettings.silent(), tmp_path, extra_callbacks=[])
    assert trainer.val_check_interval == 40


def test_a_key_in_netrc_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_wandb_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_wandb_key()
