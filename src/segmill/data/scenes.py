"""Generated rooms with true depth: what the demo and the tests learn from, without a download.

Eight classes: wall, floor, ceiling, box, ball, post, door, picture. All of them draw colour and
pattern from the same urn, and some balls are only painted on a wall or on the floor (and are
labelled so): shape tells a class, colour hardly, and depth settles what the picture leaves open.
A seed gives the same scene on every platform.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16

from segmill.data.depth import depth_channel
from segmill.data.raycast import Hits, Placed, Points, Vector, column, dot, paint, trace
from segmill.data.rooms import CEILING, FLOOR, WALL, Camera, between, cover, empty_room, furnish
from segmill.data.rooms import viewer as place_viewer
from segmill.data.sample import Sample
from segmill.errors import SegmillError

DEPTH_RANGE = (0.0, 9000.0)  # millimetres, more than any room is deep; as in data/scenes.yaml
VERSION = 1  # in the manifest: raise it when the same seed gives another scene
MANIFEST = "manifest.json"
FOLDERS = ("images", "depth", "labels")
NOISE = 0.02  # of the sensor, in units of full white


@dataclass(frozen=True)
class Scene:
    """One rendered room; depth in millimetres along the optical axis, as sensors report it."""

    image: UInt8[np.ndarray, "H W 3"]
    depth: UInt16[np.ndarray, "H W"]
    label: UInt8[np.ndarray, "H W"]


def render_scene(seed: int, *, height: int, width: int) -> Sample:
    """The room of `seed` as training sees it: RGB and 8-bit depth (0..9 m), with its label."""
    scene = ray_cast(seed, height=height, width=width)
    depth = depth_channel(scene.depth, DEPTH_RANGE, f"room {seed}")
    return Sample(np.dstack([scene.image, depth]), scene.label, f"{seed:06d}")


def ray_cast(seed: int, *, height: int, width: int) -> Scene:
    """Furnish the room of `seed`, look at it, and light it with one lamp that casts shadows."""
    rng = np.random.RandomState(seed)
    room = empty_room(rng)
    camera = place_viewer(rng, room)
    things = furnish(rng, room, camera)
    solids = [thing.placed for thing in things]
    direction = _rays(camera, height, width)
    hits = trace(room, solids, camera.position, direction)
    point = column(camera.position) + hits.distance * direction
    light = paint(hits, cover(rng, things)) * _light(rng, room, solids, point, hits)
    classes = np.asarray([FLOOR, CEILING, *[WALL] * 4, *(thing.label for thing in things)])
    return Scene(
        image=_develop(rng, light).T.reshape(height, width, 3),
        depth=np.floor(hits.distance * 1000 + 0.5).astype(np.uint16).reshape(height, width),
        label=classes[hits.surface].astype(np.uint8).reshape(height, width),
    )


def write_scenes(
    root: str | Path, *, train: int, val: int, test: int, height: int, width: int, seed: int
) -> None:
    """Write a FolderDataset of `train`, `val` and `test` scenes: all of it or nothing.

    Nothing happens when `root` holds these very scenes. A folder of other scenes is replaced; a
    folder with anything else in it is an error. Splits never share a room.
    """
    root, splits = Path(root), {"train": train, "val": val, "test": test}
    manifest = {
        "generator": "segmill.data.scenes",
        "version": VERSION,
        "splits": splits,
        "size": [height, width],
        "seed": seed,
    }
    if _written(root) == manifest:
        return
    _refuse_foreign_files(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as scratch:
        fresh = Path(scratch) / "new"
        first = seed * 1_000_000
        for split, count in splits.items():
            _write_split(fresh, split, range(first, first + count), height, width)
            first += count
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _put_in_place(fresh, root, manifest, Path(scratch) / "old")


def _rays(camera: Camera, height: int, width: int) -> Points:
    """One ray a pixel centre, of length 1 along the optical axis: its distance is the depth."""
    across = (np.arange(width) + 0.5 - width / 2) / (camera.focal * width)
    down = (np.arange(height) + 0.5 - height / 2) / (camera.focal * width)
    across, down = np.tile(across, height), np.repeat(down, width)
    return column(camera.forward) + across * column(camera.right) - down * column(camera.up)


def _light(
    rng: np.random.RandomState, room: Vector, solids: list[Placed], point: Points, hits: Hits
) -> Points:
    """Ambient light and one tinted lamp below the ceiling: Lambert, falling off, with shadows."""
    lamp: Vector = (
        between(rng, 0.2, 0.8) * room[0],
        between(rng, 0.2, 0.8) * room[1],
        room[2] - between(rng, 0.15, 0.5),
    )
    tint: Vector = (between(rng, 0.8, 1.2), between(rng, 0.8, 1.2), between(rng, 0.8, 1.2))
    ambient, strength = between(rng, 0.25, 0.5), between(rng, 1.2, 2.5)
    ray = point - column(lamp)
    square = dot(ray, ray)
    facing = np.maximum(-dot(ray, hits.normal), 0.0) / np.sqrt(square)
    lit = trace(room, solids, lamp, ray).distance > 1 - 1e-3 / np.sqrt(square)
    diffuse = strength * facing * np.where(lit, 1.0, 0.0) / (1 + 0.25 * square)
    # Light from all sides is a little weaker below than above, so that corners show in shadow.
    return column(tint) * (ambient * (1 + 0.25 * hits.normal[2]) + diffuse)


def _develop(rng: np.random.RandomState, light: Points) -> UInt8[np.ndarray, "3 N"]:
    """Exposure, gamma 2 and sensor noise (a sum of uniforms: bell-shaped, the same everywhere)."""
    exposed = np.sqrt(np.minimum(light * between(rng, 0.8, 1.5), 1.0))
    grain = rng.random_sample((4, 3, light.shape[1]))
    grain = (grain[0] + grain[1] + grain[2] + grain[3] - 2.0) * (NOISE * 1.7)
    return np.floor(np.clip(exposed + grain, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _written(root: Path) -> object:
    path = root / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _refuse_foreign_files(root: Path) -> None:
    entries = {path.name for path in root.iterdir()} if root.exists() else set()
    foreign = sorted(entries - {MANIFEST, *FOLDERS})
    if foreign or (entries and MANIFEST not in entries):
        raise SegmillError(
            f"{root} is to be filled with generated scenes, but holds other files "
            f"({', '.join(foreign or sorted(entries))[:120]}). Set data.data_root to an empty or "
            f"new folder."
        )


def _put_in_place(fresh: Path, root: Path, manifest: object, old: Path) -> None:
    """Another process may have been faster; its scenes are the same and may be in use already."""
    if _written(root) == manifest:
        return
    if root.exists():
        root.rename(old)
    try:
        fresh.rename(root)
    except OSError:
        if _written(root) != manifest:
            raise


def _write_split(root: Path, split: str, seeds: range, height: int, width: int) -> None:
    folders = [root / folder / split for folder in FOLDERS]
    for folder in folders:
        folder.mkdir(parents=True)
    for seed in seeds:
        scene = ray_cast(seed, height=height, width=width)
        pictures = (np.ascontiguousarray(scene.image[..., ::-1]), scene.depth, scene.label)
        for folder, picture in zip(folders, pictures, strict=True):
            (folder / f"{seed:06d}.png").write_bytes(cv2.imencode(".png", picture)[1].tobytes())
