from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segmill.cli import main
from segmill.data.classes import read_classes
from segmill.data.files import DataError
from segmill.data.guess import guess


def write_pair(root: Path, image: str, label: str, *, palette: bool = False) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (24, 32, 3)).astype(np.uint8)
    values = Image.fromarray(np.array([3, 7, 255], np.uint8).repeat(256).reshape(24, 32))
    if palette:
        values.putpalette(list(range(256)) * 3)
    for path, picture in ((root / image, Image.fromarray(pixels)), (root / label, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


@pytest.fixture
def street(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders per split; the current folder is beside it."""
    root = tmp_path / "street"
    for split in ("training", "validation"):
        write_pair(root, f"images/{split}/a.jpg", f"annotations/{split}/a.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def test_folders_of_splits_are_found(street: Path):
    found = guess(street)
    assert found.image == "images/{split}/{name}.jpg"
    assert found.label == "annotations/{split}/{name}.png"
    assert found.splits == {"train": {"folder": "training"}, "val": {"folder": "validation"}}
    assert found.values == (3, 7)
    assert found.label_format == "index"
    assert found.depth is None


def test_lists_of_segmentation_and_palettes_are_found(tmp_path: Path):
    for name in ("a", "b"):
        write_pair(
            tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", palette=True
        )
    for task, names in (("Action", "zzz"), ("Segmentation", "a")):
        for split in ("train", "val"):
            path = tmp_path / "ImageSets" / task / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{names}\n")
    found = guess(tmp_path)
    assert found.splits["val"] == {"list": "ImageSets/Segmentation/val.txt"}
    assert found.label_format == "palette"


def test_16_bit_depth_gets_its_range(street: Path):
    for split in ("training", "validation"):
        (street / "depth" / split).mkdir(parents=True)
        depth = np.full((24, 32), 6500, np.uint16)
        cv2.imwrite(str(street / "depth" / split / "a.png"), depth)
    found = guess(street)
    assert found.depth == "depth/{split}/{name}.png"
    assert found.depth_range == (0, 6500)


def test_the_written_files_pass_data_check(street: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "new", str(street)]) == 0
    assert "data check data=street" in capsys.readouterr().out.splitlines()[-1]
    assert len(read_classes("street")) == 2
    assert main(["data", "check", "data=street"]) == 0
    assert "No problem found" in capsys.readouterr().out


def test_existing_files_are_never_overwritten(street: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "new", str(street)]) == 0
    assert main(["data", "new", str(street)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.jpg", "train/b.jpg"], "no labels were recognised"),
        (["images/a.jpg", "labels/a.png"], "no split into training and validation"),
    ],
)
def test_what_cannot_be_guessed_is_said(tmp_path: Path, files: list[str], message: str):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    with pytest.raises(DataError, match=message):
        guess(tmp_path)


def test_an_absent_folder_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        guess(tmp_path / "nowhere")
