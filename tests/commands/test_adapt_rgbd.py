"""Models of RGB-D images adapt with their depth; what adaptation does not do is refused."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import segmill
from segmill.cli import main
from segmill.commands.adapt_parts import build_adapt_parts
from segmill.commands.adapt_refusals import refuse_channels, refuse_protocol
from segmill.configuration import build, compose
from segmill.data.classes import read_classes
from segmill.errors import SegmillError
from segmill.protocol import Protocol
from segmill.segmenter import Segmenter, save_segmenter
from segmill.tta.module import TTAModule
from tiny_adaptation import results_of, tiny_adapt_words


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A model file for three and one for four channels, with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for channels, name in {3: "fcn_tiny", 4: "fcn_tiny_rgbd"}.items():
        torch.manual_seed(0)
        model = segmill.load(name, num_classes=8)
        found[channels] = folder / f"{name}.safetensors"
        described = Segmenter(
            model.model, read_classes("scenes"), model.protocol, model.config, (0.0, 9000.0)
        )
        save_segmenter(found[channels], described)
    return found


def words_of_run(folder: Path, run: Path, **changes: object) -> list[str]:
    brought = ("weights=", "model/discriminative=", "model/generative=")
    words = tiny_adapt_words(folder, run=run, model__generative="null", pictures=0, **changes)
    return [each for each in words if not each.startswith(brought)]


def test_a_run_with_depth_adapts_to_images_with_corrupted_colour(
    tmp_path: Path, runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[torch.Tensor] = []
    step = TTAModule.training_step

    def watched(self: TTAModule, batch: dict[str, Any], batch_idx: int) -> None:
        images.append(batch["original"])
        step(self, batch, batch_idx)

    monkeypatch.setattr(TTAModule, "training_step", watched)
    changes = {"data__channels": 4, "tta": "tent", "limit": 1}
    assert main(["adapt", *words_of_run(tmp_path, runs[4], **changes), "--trace"]) == 0
    run = tmp_path / "runs" / "tiny"
    for row in ("source", "tent"):
        assert all(np.isfinite(each.loss) for each in results_of(run, row))
    noise, contrast = images[:2]
    assert noise.shape == contrast.shape == (1, 4, 64, 96)
    assert torch.equal(noise[:, 3], contrast[:, 3])
    assert not torch.equal(noise[:, :3], contrast[:, :3])


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one paragraph with which the command ends before it has written anything."""
    assert main(["adapt", *words]) == 2
    assert not (folder / "runs").exists()
    assert not (folder / "scenes").exists()
    (message,) = capsys.readouterr().err.splitlines()
    return message


def test_a_run_without_depth_refuses_images_with_depth_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: dict[int, Path]
) -> None:
    words = words_of_run(tmp_path, runs[3], methods="[]", data__channels=4)
    message = refused(words, tmp_path, capsys)
    assert message.startswith(f"segmill: run={runs[3]} takes 3 channels and no depth, but data.ch")
    assert "Set data.channels=3, or choose a model" in message


@pytest.mark.parametrize(
    ("keys", "name", "remedy"),
    [
        (["run={}"], "run={}", "Set data.channels=4."),
        (["run={}", "data.depth=null"], "run={}", "Set data.channels=4, and data.depth to the"),
        (
            ["model/discriminative=fcn_tiny_rgbd", "weights=random"],
            "The model",
            "Set data.channels=4.",
        ),
    ],
)
def test_a_model_with_depth_asks_for_it(
    runs: dict[int, Path], keys: list[str], name: str, remedy: str
) -> None:
    words = ["data=scenes_c", *(each.format(runs[4]) for each in keys)]
    with pytest.raises(SegmillError) as error:
        refuse_channels(compose("adapt", words))
    message = str(error.value)
    assert message.startswith(f"{name.format(runs[4])} takes colour and depth, but data.channels=3")
    assert remedy in message


def test_another_range_of_depth_than_that_of_the_training_is_said(
    tmp_path: Path, runs: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for farthest in (9000, 10000):
        changes = {"data__channels": 4, "data__depth_range": f"[0,{farthest}]"}
        words = words_of_run(tmp_path, runs[4], tta="tent", **changes)
        with caplog.at_level(logging.WARNING, logger="segmill"):
            build_adapt_parts(compose("adapt", words))
    (record,) = caplog.records
    assert "data.depth_range=[0.0, 9000.0], data=scenes_c has [0.0, 10000.0]" in record.getMessage()


def at_protocol(*keys: str) -> Protocol:
    return build(compose("adapt", ["data=scenes_c", *keys]).protocol)


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (["protocol=nyu_ms_flip"], "protocol=nyu_ms_flip resizes the image on the device"),
        (["protocol=sun_ms_flip_slide", "protocol.pad_to=[531,730]"], "Set protocol=whole"),
        (["protocol=nyu_ss", "protocol.pad_to=[531,730]"], "Set protocol.pad_to=null"),
        (["protocol=nyu_ss"], "Set protocol.absent_class=drop"),
        (["protocol.absent_class=zero"], "protocol=whole has protocol.absent_class=zero"),
    ],
)
def test_protocols_that_adaptation_does_not_follow_are_refused(
    keys: list[str], answer: str
) -> None:
    with pytest.raises(SegmillError, match=re.escape(answer)):
        refuse_protocol(at_protocol(*keys))


def test_the_single_scale_protocol_of_dformer_does_without_absent_classes() -> None:
    refuse_protocol(at_protocol("protocol=nyu_ss", "protocol.absent_class=drop"))


def test_a_protocol_is_refused_before_anything_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_adapt_words(tmp_path, methods="[]"), "protocol=nyu_ms_flip"]
    assert "protocol=nyu_ms_flip resizes" in refused(words, tmp_path, capsys)
