"""`segmill train`, `eval` and `predict` with a classifier of images: the digits."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from segmill.cli import main
from segmill.data.digits import Digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    words = [
        "model=discriminative/classifier/convnext_tiny_digits",
        "model.network.options={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8], patch_size: 2}",
        "data=digits",
        "data.batch_size=16",
        "trainer=cpu",
        "trainer.max_steps=3",
        "trainer.val_every=3",
        "trainer.progress=false",
        "schedule.warmup_steps=2",
        f"output_dir={folder}",
        "experiment.name=tiny",
    ]
    assert main(["train", *words, "--trace"]) == 0
    return folder / "tiny"


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_an_evaluation_has_top_1_top_5_and_the_calibration_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", f"run={run}", "split=test", "trainer=cpu"]) == 0
    folder = run / "eval_digits_test_whole"
    facts = facts_of(folder)
    scores = facts["scores"]
    assert (facts["split"], facts["images"]) == ("test", 597)
    assert scores["top1"] == scores["aAcc"]
    assert scores["top1"] < scores["top5"] <= 1
    assert 0 < scores["ece"] < 1
    assert f"top1 {100 * scores['top1']:.2f}  top5" in capsys.readouterr().out
    assert "top5" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_end_of_a_training_has_the_same_scores_as_an_evaluation(run: Path) -> None:
    assert main(["eval", f"run={run}", "trainer=cpu"]) == 0
    assert facts_of(run / "eval_digits_val_whole")["scores"] == facts_of(run)["scores"]


def test_predictions_are_the_five_likeliest_classes_of_every_image(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digit = Digits(split="test", size=32)[0].image
    cv2.imwrite(str(tmp_path / "small.png"), digit)
    cv2.imwrite(str(tmp_path / "large.png"), cv2.resize(digit, (80, 64)))
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="segmill"):
        assert main(["predict", f"run={run}", str(tmp_path / "*.png"), f"output_dir={out}"]) == 0
    with (out / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["large", "small"]
    for row in rows:
        classes = [row[f"class_{place}"] for place in range(1, 6)]
        probs = [float(row[f"prob_{place}"]) for place in range(1, 6)]
        assert len(set(classes)) == 5
        assert set(classes) <= set("0123456789")
        assert probs == sorted(probs, reverse=True)
        assert 0 < sum(probs) <= 1 + 1e-6  # float32
        assert f"{row['image']}  {classes[0]} {probs[0]:.3f}" in caplog.text
    assert not (out / "overlay").exists()


def test_a_video_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "film.avi"
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (32, 32))
    film.write(np.zeros((32, 32, 3), np.uint8))
    film.release()
    assert main(["predict", f"run={run}", str(path), f"output_dir={tmp_path / 'out'}"]) == 2
    assert "film is a video" in capsys.readouterr().err
