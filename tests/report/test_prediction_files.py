"""Predictions as files that viewers show and FolderDataset reads."""

import cv2
import numpy as np
import pytest

from segmill.data.classes import Classes, read_classes
from segmill.data.inputs import Input, iter_inputs
from segmill.errors import SegmillError
from segmill.report.prediction import PredictionWriter

CLASSES = Classes(
    ("road", "天空"), np.array([[250, 0, 0], [0, 0, 250]], np.uint8), ("a road", "the sky")
)
PRED = np.array([[0] * 32 + [1] * 32] * 48, np.uint8)
IMAGE = np.full((48, 64, 3), 100, np.uint8)


def write(folder, *inputs):
    with PredictionWriter(folder, classes=CLASSES, alpha=0.5) as writer:
        return [writer.write(item, PRED) for item in inputs]


def test_an_image_gives_overlay_and_index(tmp_path):
    (path,) = write(tmp_path, Input("deep/street", IMAGE, None, None))
    assert path == tmp_path / "overlay" / "deep" / "street.jpg"
    shown = cv2.imread(str(path))[..., ::-1]
    np.testing.assert_allclose(shown[10, 5], [175, 50, 50], atol=6)  # JPEG


def test_the_index_file_reads_back_as_it_was(tmp_path):
    write(tmp_path, Input("street", IMAGE, None, None))
    index = cv2.imread(str(tmp_path / "index" / "street.png"), cv2.IMREAD_UNCHANGED)
    assert index.dtype == np.uint8
    assert (index == PRED).all()


def test_legend_and_classes_are_written_once_for_the_folder(tmp_path):
    write(tmp_path, Input("a", IMAGE, None, None), Input("b", IMAGE, None, None))
    assert cv2.imread(str(tmp_path / "legend.png")) is not None
    read = read_classes(tmp_path / "classes.csv")
    assert read.names == CLASSES.names
    assert (read.palette == CLASSES.palette).all()


def test_a_video_becomes_a_film_and_index_frames(tmp_path):
    frames = [Input("clip", IMAGE, index, 10.0) for index in range(4)]
    paths = write(tmp_path, *frames)
    assert set(paths) == {tmp_path / "overlay" / "clip.mp4"}
    film = list(iter_inputs([str(paths[0])], depth=None, depth_range=None))
    assert [(item.image.shape, item.fps) for item in film] == [((48, 64, 3), 10.0)] * 4
    assert len(list((tmp_path / "index" / "clip").iterdir())) == 4


def test_an_interrupted_film_can_be_watched(tmp_path):
    def predict_one_frame_and_stop():
        with PredictionWriter(tmp_path, classes=CLASSES, alpha=0.5) as writer:
            writer.write(Input("clip", IMAGE, 0, None), PRED)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_one_frame_and_stop()
    film = list(iter_inputs([str(tmp_path / "overlay" / "clip.mp4")], depth=None, depth_range=None))
    assert len(film) == 1


def test_a_film_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, "fourcc", lambda *letters: 0)
    with pytest.raises(SegmillError, match=r"cannot write .*clip\.mp4"):
        write(tmp_path, Input("clip", IMAGE, 0, 10.0))


def test_no_unfinished_file_stays(tmp_path):
    write(tmp_path, Input("a", IMAGE, None, None), Input("clip", IMAGE, 0, 10.0))
    assert not list(tmp_path.rglob(".*"))
