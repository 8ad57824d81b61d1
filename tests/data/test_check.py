from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny_folder import tiny_dataset, write_label, write_samples

from segmill.data.check import check_dataset


def test_counts_sizes_and_depth_are_reported(tmp_path: Path):
    write_samples(tmp_path, "a b")
    for name, far in (("a", 4000), ("b", 9000)):
        depth = np.full((24, 32), 500, np.uint16)
        depth[:12] = 0
        depth[-1] = far
        (tmp_path / "depth").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"depth/{name}.png"), depth)
    dataset = tiny_dataset(tmp_path, depth="depth/{name}.png", depth_range=(0.0, 9000.0))
    done = []
    report = check_dataset(dataset, progress=done.append)
    assert report.problems == []
    assert report.pixels.tolist() == [576, 576, 384]
    assert report.ignored == 0
    assert report.sizes == {(32, 24): 2}
    assert report.depth_range == (500, 9000)
    assert report.depth_zero == 0.5
    assert done == [1, 2]


@pytest.mark.parametrize(("nearest", "expected", "zero"), [(0, (0, 200), 0.5), (7, (7, 200), 0.0)])
def test_8_bit_depth_as_it_is_has_its_zeros_in_the_range(
    tmp_path: Path, nearest: int, expected: tuple[int, int], zero: float
):
    write_samples(tmp_path, "a")
    depth = np.full((24, 32), 200, np.uint8)
    depth[:12] = nearest
    cv2.imwrite(str(tmp_path / "a.png"), depth)
    report = check_dataset(tiny_dataset(tmp_path, depth="{name}.png"))
    assert report.problems == []
    assert report.depth_as_it_is
    assert report.depth_range == expected
    assert report.depth_zero == zero


def test_16_bit_depth_without_a_range_is_a_problem_with_its_values(tmp_path: Path):
    write_samples(tmp_path, "a")
    cv2.imwrite(str(tmp_path / "a.png"), np.full((24, 32), 3000, np.uint16))
    report = check_dataset(tiny_dataset(tmp_path, depth="{name}.png"))
    assert len(report.problems) == 1
    assert "a.png is 16-bit (highest value 3000)" in report.problems[0]


def test_depth_that_was_never_measured_has_no_range(tmp_path: Path):
    write_samples(tmp_path, "a")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((24, 32), np.uint16))
    dataset = tiny_dataset(tmp_path, depth="{name}.png", depth_range=(0.0, 9.0))
    report = check_dataset(dataset)
    assert report.depth_range is None
    assert report.depth_zero == 1.0


def test_every_looks_at_some_only(tmp_path: Path):
    write_samples(tmp_path, "a b c d e")
    assert check_dataset(tiny_dataset(tmp_path), every=2).samples == 3


def test_all_problems_are_found_in_one_pass(tmp_path: Path):
    names = "missing truncated value size wide palette both good"
    write_samples(tmp_path, names)
    images, labels = tmp_path / "images/train", tmp_path / "labels/train"
    (labels / "missing.png").unlink()
    for name in ("truncated", "both"):
        whole = (images / f"{name}.jpg").read_bytes()
        (images / f"{name}.jpg").write_bytes(whole[: len(whole) // 2])
    write_label(labels / "value.png", (0, 77))
    write_label(labels / "both.png", (0, 99))
    write_label(labels / "size.png", height=20)
    cv2.imwrite(str(labels / "wide.png"), np.zeros((24, 32), np.uint16))
    cv2.imwrite(str(labels / "palette.png"), np.zeros((24, 32, 3), np.uint8))
    (tmp_path / "train.txt").write_text(f"{names} nowhere".replace(" ", "\n"))
    dataset = tiny_dataset(tmp_path, splits={"train": {"list": "train.txt"}})
    report = check_dataset(dataset)
    found = [
        ("missing.png", "does not exist"),
        ("truncated.jpg", "truncated"),
        ("value.png", "77 (384 pixels)"),
        ("size.png", "32 x 20"),
        ("wide.png", "16-bit"),
        ("palette.png", "3 channels"),
        ("both.jpg", "truncated"),
        ("both.png", "99 (384 pixels)"),
        ("nowhere.jpg", "train.txt"),
        ("nowhere.png", "train.txt"),
    ]
    assert len(report.problems) == len(found)
    for file, words in found:
        assert any(file in problem and words in problem for problem in report.problems), file
