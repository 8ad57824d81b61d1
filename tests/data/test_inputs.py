"""What predict can be pointed at."""

import cv2
import numpy as np
import pytest

from segmill.data.files import DataError
from segmill.data.inputs import find_inputs, iter_inputs


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for index, name in enumerate(("b.jpg", "a.png", "deep/c.png")):
        picture = np.full((6, 8, 3), (10 * index, 100, 200), np.uint8)
        cv2.imwrite(str(tmp_path / "in" / name), picture)
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    return tmp_path / "in"


def read(*paths, depth=None, depth_range=None):
    return list(iter_inputs([str(p) for p in paths], depth=depth, depth_range=depth_range))


def video(path, frames=5, size=(48, 64)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, size[::-1])
    for index in range(frames):
        writer.write(np.full((*size, 3), 40 * index, np.uint8))
    writer.release()
    return path


def test_a_file_is_named_by_its_stem_and_read_as_rgb(folder):
    (item,) = read(folder / "a.png")
    assert item.name == "a"
    assert item.image[0, 0].tolist() == [200, 100, 10]
    assert item.frame is None


def test_a_folder_gives_its_images_sorted_with_subfolders_in_the_name(folder):
    assert [item.name for item in read(folder)] == ["a", "b", "deep/c"]


def test_a_glob_gives_what_it_matches(folder):
    assert [item.name for item in read(folder / "*.png")] == ["a"]
    assert [item.name for item in read(folder / "**" / "*.png")] == ["a", "c"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder):
    cv2.imwrite(str(folder / "x[1].png"), np.zeros((4, 4, 3), np.uint8))
    assert [item.name for item in read(folder / "x[1].png")] == ["x[1]"]


def test_a_video_gives_its_frames(tmp_path):
    items = read(video(tmp_path / "clip.mp4"))
    assert [(item.name, item.frame, item.fps) for item in items] == [
        ("clip", index, 10.0) for index in range(5)
    ]
    assert items[4].image.mean() == pytest.approx(160, abs=4)  # a lossy codec


@pytest.mark.parametrize(
    ("path", "says"),
    [("absent.png", "does not exist"), ("*.nothing", "matches no file"), ("empty", "no image")],
)
def test_nothing_found_is_said_before_anything_is_decoded(tmp_path, path, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        find_inputs([str(tmp_path / path)])


def test_no_path_at_all_is_an_error():
    with pytest.raises(DataError, match="nothing to predict on"):
        find_inputs([])


def test_two_inputs_of_one_name_are_refused(folder):
    cv2.imwrite(str(folder / "a.jpg"), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.jpg and .*a\.png would both be written as 'a'"):
        find_inputs([str(folder)])


@pytest.mark.parametrize("name", ["broken.png", "broken.txt"])
def test_an_unreadable_image_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_a_truncated_jpeg_is_not_filled_with_grey(tmp_path):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)
    (tmp_path / "half.jpg").write_bytes(cv2.imencode(".jpg", noise)[1].tobytes()[:2000])
    with pytest.raises(DataError, match=r"half\.jpg"):
        read(tmp_path / "half.jpg")


def test_a_broken_video_is_named(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no film")
    with pytest.raises(DataError, match=r"clip\.mp4 gives no frame"):
        read(tmp_path / "clip.mp4")


def test_depth_files_become_the_fourth_channel(folder, tmp_path):
    (tmp_path / "depth" / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        depth = np.full((6, 8), 4500, np.uint16)
        depth[0] = 0
        cv2.imwrite(str(tmp_path / "depth" / f"{name}.png"), depth)
    items = read(folder, depth=tmp_path / "depth", depth_range=(0.0, 9000.0))
    assert all(item.image.shape == (6, 8, 4) for item in items)
    assert items[0].image[0, 0, 3] == 0
    assert items[0].image[3, 3, 3] == 128


def test_one_depth_file_goes_with_one_image(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "d.png"), np.full((6, 8), 9, np.uint8))
    (item,) = read(folder / "a.png", depth=tmp_path / "d.png", depth_range=(0.0, 255.0))
    assert item.image[0, 0, 3] == 9
    with pytest.raises(DataError, match="one depth file for 3 images"):
        read(folder, depth=tmp_path / "d.png", depth_range=(0.0, 255.0))


def test_missing_or_misfitting_depth_is_an_error(folder, tmp_path):
    with pytest.raises(DataError, match=r"depth of .*a\.png is missing"):
        read(folder, depth=tmp_path / "nowhere", depth_range=(0.0, 255.0))
    cv2.imwrite(str(tmp_path / "d.png"), np.zeros((6, 9), np.uint8))
    with pytest.raises(DataError, match="9 x 6, but its image is 8 x 6"):
        read(folder / "a.png", depth=tmp_path / "d.png", depth_range=(0.0, 255.0))


def test_8_bit_depth_of_a_model_without_a_range_stays_as_it_is(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "d.png"), np.full((6, 8), 77, np.uint8))
    (item,) = read(folder / "a.png", depth=tmp_path / "d.png")
    assert (item.image[..., 3] == 77).all()
    cv2.imwrite(str(tmp_path / "d.png"), np.full((6, 8), 3210, np.uint16))
    with pytest.raises(DataError, match=r"d\.png is 16-bit \(highest value 3210\).*depth_range"):
        read(folder / "a.png", depth=tmp_path / "d.png")
