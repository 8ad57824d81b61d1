"""`segmill data check` of ImageNet-C's folders: every problem at once, and what to do next."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmill.cli import main

WNIDS = ("n01440764", "n01443537", "n02999410")
CORRUPTIONS = ("fog", "snow", "frost", "contrast")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for corruption in CORRUPTIONS:
        for number, wnid in enumerate(WNIDS):
            path = tmp_path / corruption / "5" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 12, 3), 40 * number, np.uint8)).save(path)
    return tmp_path


def check(root: Path, *words: str) -> int:
    keys = [f"data.data_root={root}", f"data.corruptions=[{','.join(CORRUPTIONS)}]"]
    return main(["data", "check", "data=imagenet_c", "data.num_classes=3", *keys, *words])


def test_a_sound_tree_is_counted(root: Path, capsys: pytest.CaptureFixture):
    assert check(root) == 0
    printed = capsys.readouterr().out
    assert "04_contrast_5: 3 images; size 12 x 8 (3)" in printed
    assert "No problem found. Next: segmill adapt data=imagenet_c" in printed


def test_all_problems_are_said_at_once(root: Path, capsys: pytest.CaptureFixture):
    shutil.rmtree(root / "snow")
    shutil.rmtree(root / "frost" / "5" / WNIDS[0])
    shutil.copy(
        root / "fog" / "5" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG",
        root / "contrast" / "5" / WNIDS[1] / "twice.JPEG",
    )
    (root / "fog" / "5" / WNIDS[2] / "ILSVRC2012_val_00000002.JPEG").write_bytes(b"")
    assert check(root) == 2
    found = capsys.readouterr()
    assert "4 problem(s) in data=imagenet_c" in found.err
    assert "has 3 of the 4 folders of this run and lacks snow/5" in found.out
    assert f"frost/5 are not the 3 expected ones: it lacks 1 ({WNIDS[0]})" in found.out
    assert f"1 that 04_contrast_5 has (the first: {WNIDS[1]}/twice) and 01_fog_5 lacks" in found.out
    assert "ILSVRC2012_val_00000002.JPEG (0 bytes) cannot be decoded" in found.out


def test_a_root_that_is_not_there_is_one_problem(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert check(tmp_path / "nowhere") == 2
    found = capsys.readouterr()
    assert found.out.count("problem") == 1
    assert "1 problem(s)" in found.err
