"""The table of a classifier's answers, and from where its view is known."""

import csv
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from segmill.commands.predict_classes import predict_classes, view_of_run
from segmill.data.classes import coloured_classes
from segmill.data.inputs import Input
from segmill.models.discriminative import Discriminative
from segmill.segmenter import Segmenter
from tiny_tasks import PROTOCOL


def test_a_classifier_of_three_classes_has_three_columns_of_each_kind(tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)).eval()
    model = Discriminative(network=network, mean=[0.5] * 3, std=[0.25] * 3)
    segmenter = Segmenter(
        model=model, classes=coloured_classes("abc"), protocol=PROTOCOL, config={}
    )
    image = Input(name="one", image=np.zeros((8, 8, 3), np.uint8), frame=None, fps=None)
    assert predict_classes(segmenter, [image], tmp_path, view=None) == 1
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["image", *(f"{what}_{n}" for n in (1, 2, 3) for what in ("class", "prob"))]
    assert {row[f"class_{n}"] for n in (1, 2, 3)} == set("abc")


def test_the_view_is_that_of_the_runs_own_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("data: {crop: [32, 32]}\n")
    (tmp_path / "model.safetensors").touch()
    for run in (tmp_path, tmp_path / "model.safetensors"):
        view = view_of_run(run)
        assert view is not None
        assert view.size == 32
    monkeypatch.chdir(tmp_path)
    assert view_of_run(Path("resnet50_gn.a1h_in1k")) is None, "a variant's name is no run"
