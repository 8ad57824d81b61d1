from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmill.cli import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One CamVid sample a split, in its layout."""
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text("one\n")
        for folder in ("images", "masks"):
            (tmp_path / folder / split).mkdir(parents=True)
        image = np.random.RandomState(0).randint(0, 256, (24, 32, 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"images/{split}/one.jpg")
        label = np.arange(12, dtype=np.uint8).repeat(64).reshape(24, 32)
        Image.fromarray(label).save(tmp_path / f"masks/{split}/one.png")
    return tmp_path


def check(root: Path, *words: str) -> int:
    return main(["data", "check", "data=camvid", f"data.data_root={root}", *words])


def test_a_good_data_set_is_described(root: Path, capsys: pytest.CaptureFixture[str]):
    assert check(root) == 0
    out = capsys.readouterr().out
    assert "bicyclist" in out
    assert "train: 1 samples; size 32 x 24 (1)" in out
    assert "segmill train data=camvid" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint8, "depth 0 to 200 (8 bit, as it is); 25.0% of the depth is 0, nearest or not"),
        (np.uint16, "depth 200 to 200; 25.0% of the depth not measured"),
    ],
)
def test_depth_is_described_for_each_split(
    root: Path, capsys: pytest.CaptureFixture[str], values: type, expected: str
):
    for split in ("train", "val", "test"):
        depth = np.full((24, 32), 200, values)
        depth[:6] = 0
        (root / "depth" / split).mkdir(parents=True)
        Image.fromarray(depth).save(root / f"depth/{split}/one.png")
    words = ["data.depth='depth/{split}/{name}.png'", "data.channels=4"]
    if values is np.uint16:
        words.append("data.depth_range=[0,255]")
    assert check(root, *words) == 0
    text = " ".join(capsys.readouterr().out.split())
    for split in ("train", "val", "test"):
        assert f"{split}: 1 samples; size 32 x 24 (1); {expected}" in text


def test_all_problems_of_all_splits_are_printed(root: Path, capsys: pytest.CaptureFixture[str]):
    (root / "images/train/one.jpg").write_bytes(b"")
    Image.fromarray(np.full((24, 32), 99, np.uint8)).save(root / "masks/val/one.png")
    (root / "test.txt").write_text("\n")
    assert check(root, "data.num_classes=12") == 2
    captured = capsys.readouterr()
    for words in (
        "images/train/one.jpg (0 bytes)",
        "values outside data.label_map: 99 (768 pixels)",
        "'test' is empty",
        "data.num_classes=12",
    ):
        assert words in captured.out
    assert "4 problem(s)" in captured.err
    assert "segmill data check" in captured.err


def test_an_absent_folder_is_one_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert check(tmp_path / "nowhere") == 2
    captured = capsys.readouterr()
    assert captured.out.count("Set data.data_root") == 1


def test_every_must_be_positive(root: Path, capsys: pytest.CaptureFixture[str]):
    assert check(root, "every=0") == 2
    assert "every=0" in capsys.readouterr().err
