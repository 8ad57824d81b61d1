import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from segmill.cli import main
from tiny_run import train_tiny

# A quarter of a room would be smaller than SegFormer's largest stride.
RATIOS = ["protocol.ratios=[1.0,1.5]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    return train_tiny(folder, trainer__max_steps=1, trainer__val_every=1)


def test_an_evaluation_takes_model_and_data_from_its_run(run: Path) -> None:
    assert main(["eval", f"run={run}", "split=test", "trainer=cpu"]) == 0
    facts = json.loads((run / "eval_scenes_test_whole" / "metrics.json").read_text())
    assert facts["data"] == "scenes"
    assert facts["split"] == "test"
    assert (run / "eval_scenes_test_whole" / "report.html").is_file()


def test_another_protocol_is_stamped_into_the_result(run: Path) -> None:
    assert main(["eval", f"run={run}", "protocol=ms_flip", *RATIOS, "trainer=cpu"]) == 0
    facts = json.loads((run / "eval_scenes_val_ms_flip" / "metrics.json").read_text())
    assert facts["protocol"]["flip"] is True
    assert facts["protocol"]["ratios"] == [1.0, 1.5]


def test_evaluating_twice_gives_the_same_numbers(run: Path) -> None:
    for _ in range(2):
        assert main(["eval", f"run={run}", "protocol=slide", "trainer=cpu"]) == 0
    first, second = (
        json.loads((run / name / "metrics.json").read_text())
        for name in ("eval_scenes_val_slide", "eval_scenes_val_slide-2")
    )
    assert first["scores"] == second["scores"]
    assert first["order"] == second["order"]


def test_a_model_of_other_classes_is_not_scored(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    word = f"data.data_root={tmp_path}"
    assert main(["eval", f"run={run}", "data=camvid", word, "trainer=cpu"]) == 2
    assert "11" in capsys.readouterr().err


def test_predictions_are_overlay_index_and_legend(run: Path, tmp_path: Path) -> None:
    images = run.parents[1] / "scenes" / "images" / "test"
    assert main(["predict", f"run={run}", str(images), f"output_dir={tmp_path}"]) == 0
    names = sorted(path.stem for path in images.iterdir())
    assert sorted(path.stem for path in (tmp_path / "overlay").iterdir()) == names
    index = cv2.imread(str(tmp_path / "index" / f"{names[0]}.png"), cv2.IMREAD_UNCHANGED)
    assert index.shape == (32, 48)
    assert index.dtype == np.uint8
    assert index.max() < 8
    assert (tmp_path / "legend.png").is_file()


def test_a_missing_picture_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", f"run={run}", "nowhere.jpg"]) == 2
    assert "nowhere.jpg" in capsys.readouterr().err


def test_depth_for_a_model_without_depth_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["predict", f"run={run}", "x.jpg", f"depth={tmp_path}"]) == 2
    assert "RGB only" in capsys.readouterr().err
