"""Generated rooms: the same everywhere, and true to the geometry that they claim."""

import hashlib
import json
import multiprocessing

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from segmill.data.classes import read_classes
from segmill.data.folder import FolderDataset
from segmill.data.raycast import Ball, Placed, Post, trace
from segmill.data.rooms import BALL, CEILING, FLOOR, empty_room, furnish, viewer
from segmill.data.scenes import DEPTH_RANGE, ray_cast, render_scene, write_scenes
from segmill.errors import SegmillError
from segmill.paths import CONFIGS

SMALL = {"height": 24, "width": 32}


def points_of(seed, height, width):
    """Every pixel's point in the room, from depth and camera alone."""
    rng = np.random.RandomState(seed)
    room = empty_room(rng)
    camera = viewer(rng, room)
    things = furnish(rng, room, camera)
    scene = ray_cast(seed, height=height, width=width)
    rows, columns = np.mgrid[:height, :width] + 0.5
    across = (columns - width / 2) / (camera.focal * width)
    down = (rows - height / 2) / (camera.focal * width)
    forward, right, up, position = (
        np.array(v) for v in (camera.forward, camera.right, camera.up, camera.position)
    )
    ray = forward + across[..., None] * right - down[..., None] * up
    return room, things, scene, position + scene.depth[..., None] / 1000 * ray


def folder_dataset(root, split):
    return FolderDataset(
        data_root=root,
        image="images/{split}/{name}.png",
        label="labels/{split}/{name}.png",
        depth="depth/{split}/{name}.png",
        depth_range=DEPTH_RANGE,
        splits={"train": {}, "val": {}, "test": {}},
        split=split,
        label_map={"0-7": "0-7"},
        label_format="index",
        classes=read_classes("scenes"),
    )


@pytest.mark.parametrize(
    ("seed", "digest"),
    [(0, "4750a8ac227ad5cc"), (7, "e0a7db44f749a99d")],
)
def test_a_seed_gives_these_very_pixels_on_every_platform(seed, digest):
    # Only IEEE-exact operations and raw generator draws are used, so the bytes may be pinned.
    scene = ray_cast(seed, height=48, width=64)
    content = scene.image.tobytes() + scene.depth.tobytes() + scene.label.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_other_seeds_give_other_scenes():
    first, second = (render_scene(seed, **SMALL).image for seed in (1, 2))
    assert np.abs(first.astype(int) - second).mean() > 5


def test_floor_and_ceiling_lie_where_the_room_says():
    room, _, scene, points = points_of(3, 96, 128)
    height = points[..., 2]
    flat_floor = (scene.label == FLOOR) & (np.abs(height) < 0.02)
    # Half a millimetre of depth rounding, seen at most about twice as long off the axis.
    assert flat_floor.sum() > 0.9 * (scene.label == FLOOR).sum()
    np.testing.assert_allclose(height[flat_floor], 0, atol=4e-3)
    np.testing.assert_allclose(height[scene.label == CEILING], room[2], atol=4e-3)


def test_ball_pixels_lie_on_a_ball():
    checked = 0
    for seed in range(8):
        _, things, scene, points = points_of(seed, 96, 128)
        off_centre = [
            np.linalg.norm(points - thing.placed.centre, axis=-1) - thing.placed.solid.radii[0]
            for thing in things
            if thing.label == BALL
        ]
        on_ball = scene.label == BALL
        checked += on_ball.sum()
        if off_centre:  # to within the rounding of depth to a millimetre
            assert (np.abs(off_centre).min(axis=0)[on_ball] < 2e-3).all()
    assert checked > 500


def test_every_class_occurs_and_none_takes_all():
    shares = np.mean(
        [np.bincount(ray_cast(s, **SMALL).label.ravel(), minlength=8) / 768 for s in range(40)],
        axis=0,
    )
    assert (shares > 0.01).all()
    assert shares.max() < 0.6


def test_colour_does_not_tell_the_class():
    # Nearest mean colour, the best guess from colour alone, must do worse than "all is wall".
    scenes = [ray_cast(seed, **SMALL) for seed in range(60)]
    colours = np.concatenate([s.image.reshape(-1, 3) for s in scenes]).astype(float)
    labels = np.concatenate([s.label.ravel() for s in scenes])
    means = np.array([colours[labels == k].mean(axis=0) for k in range(8)])
    guess = np.linalg.norm(colours[:, None] - means, axis=2).argmin(axis=1)
    recall = np.mean([(guess[labels == k] == k).mean() for k in range(8)])
    assert recall < 0.3


def test_the_yaml_states_the_depth_range():
    config = OmegaConf.load(CONFIGS / "data" / "scenes.yaml")
    assert tuple(config.depth_range) == DEPTH_RANGE


def test_depth_stays_within_the_range_of_the_yaml():
    deepest = max(int(ray_cast(seed, **SMALL).depth.max()) for seed in range(40))
    assert deepest < DEPTH_RANGE[1]


def test_a_post_shows_its_side_and_its_top():
    post = Placed(Post(0.5, 1.0), (2.0, 2.0, 1.0), (1.0, 0.0))
    rays = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]).T
    side = trace((4.0, 4.0, 4.0), [post], (0.5, 2.0, 1.0), rays[:, :1])
    top = trace((4.0, 4.0, 4.0), [post], (2.0, 2.0, 3.0), rays[:, 1:])
    assert side.distance.tolist() == [1.0]
    assert side.normal[:, 0].tolist() == [-1.0, 0.0, 0.0]
    assert top.distance.tolist() == [1.0]
    assert top.normal[:, 0].tolist() == [0.0, 0.0, 1.0]


def test_a_squashed_ball_is_flat():
    painted = Placed(Ball((0.5, 0.002, 0.5)), (2.0, 4.0, 2.0), (1.0, 0.0))
    along = np.array([[0.0, 0.1], [1.0, 1.0], [0.0, 0.0]])
    hits = trace((4.0, 4.0, 4.0), [painted], (2.0, 1.0, 2.0), along)
    np.testing.assert_allclose(hits.distance, 3.0, atol=0.003)
    assert hits.surface.tolist() == [6, 6]


def test_files_read_back_as_the_rendered_samples(tmp_path):
    write_scenes(tmp_path / "scenes", train=2, val=1, test=1, seed=3, **SMALL)
    dataset = folder_dataset(tmp_path / "scenes", "val")
    sample, rendered = dataset[0], render_scene(3_000_002, **SMALL)
    assert (sample.image == rendered.image).all()
    assert (sample.label == rendered.label).all()
    assert len(folder_dataset(tmp_path / "scenes", "train")) == 2


def test_depth_files_hold_millimetres_in_16_bit(tmp_path):
    write_scenes(tmp_path / "scenes", train=1, val=1, test=1, seed=0, **SMALL)
    path = tmp_path / "scenes" / "depth" / "train" / "000000.png"
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16
    assert (depth == ray_cast(0, **SMALL).depth).all()


def test_splits_share_no_room(tmp_path):
    write_scenes(tmp_path / "scenes", train=3, val=2, test=2, seed=0, **SMALL)
    names = [p.stem for p in (tmp_path / "scenes" / "images").rglob("*.png")]
    assert len(names) == len(set(names)) == 7


def test_the_same_request_writes_nothing_again(tmp_path):
    root = tmp_path / "scenes"
    write_scenes(root, train=1, val=1, test=1, seed=0, **SMALL)
    before = (root / "manifest.json").stat().st_mtime_ns
    write_scenes(root, train=1, val=1, test=1, seed=0, **SMALL)
    assert (root / "manifest.json").stat().st_mtime_ns == before


def test_another_request_replaces_the_scenes(tmp_path):
    root = tmp_path / "scenes"
    write_scenes(root, train=3, val=1, test=1, seed=0, **SMALL)
    write_scenes(root, train=1, val=1, test=1, seed=1, **SMALL)
    assert len(list((root / "images" / "train").iterdir())) == 1
    assert json.loads((root / "manifest.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SegmillError, match=r"thesis\.tex.*data\.data_root"):
        write_scenes(tmp_path, train=1, val=1, test=1, seed=0, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("segmill.data.scenes.cv2.imencode", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", train=1, val=1, test=1, seed=0, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_write_the_same_scenes_at_once(tmp_path):
    request = {"root": str(tmp_path / "scenes"), "train": 4, "val": 1, "test": 1, "seed": 0}
    context = multiprocessing.get_context("spawn")
    pair = [context.Process(target=write_scenes, kwargs={**request, **SMALL}) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(folder_dataset(tmp_path / "scenes", "train")) == 4
