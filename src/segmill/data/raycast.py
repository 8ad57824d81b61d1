"""Rays against blocks, balls and posts, and the paint and light on what they hit.

Every operation is an IEEE-exact one (+ - * / sqrt, comparisons, integers), one at a time and in a
fixed order, and no sum runs through BLAS: the same numbers come out on every platform.
Lengths are metres; a room stands on z = 0 with one corner in the origin.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Vector = tuple[float, float, float]
Points = Float[np.ndarray, "3 N"]
PATTERNS = ("plain", "checker", "stripes", "tiles", "clouds")
SMALL = 1e-9  # a direction this flat counts as this steep, so that no division is by zero


@dataclass(frozen=True)
class Block:
    """A cuboid given by its half sizes; like every solid, centred in a frame of its own."""

    half: Vector

    @property
    def reach(self) -> float:
        """Radius of a sphere around the solid: half the diagonal."""
        x, y, z = self.half
        return math.sqrt(x * x + y * y + z * z)

    def hit(self, origin: Vector, direction: Points) -> tuple[Float[np.ndarray, " N"], Points]:
        """Where rays enter: distance in units of `direction` (inf = missed) and unit normal.

        A ray enters by the last of three front faces, before leaving by the first back face.
        """
        steep = np.where(np.abs(direction) < SMALL, SMALL, direction)
        centre = -column(origin) / steep
        thick = column(self.half) / np.abs(steep)
        front, back = centre - thick, centre + thick
        enter = front.max(axis=0)
        missed = (enter >= back.min(axis=0)) | (enter <= 0)
        first = np.arange(3)[:, None] == front.argmax(axis=0)
        return np.where(missed, np.inf, enter), np.where(first, -np.sign(steep), 0.0)


@dataclass(frozen=True)
class Ball:
    """An ellipsoid lit like a sphere: squashed flat against a wall, it is a painted ball."""

    radii: Vector

    @property
    def reach(self) -> float:
        """The longest half axis."""
        return max(self.radii)

    def hit(self, origin: Vector, direction: Points) -> tuple[Float[np.ndarray, " N"], Points]:
        """Solve the unit sphere's quadratic after dividing by the radii."""
        start, along = column(origin) / column(self.radii), direction / column(self.radii)
        enter = _quadratic(dot(along, along), dot(along, start), dot(start, start) - 1.0)
        reached = np.where(np.isfinite(enter), enter, 0.0)
        return enter, start + reached * along


@dataclass(frozen=True)
class Post:
    """An upright cylinder."""

    radius: float
    half_height: float

    @property
    def reach(self) -> float:
        """Half the diagonal."""
        return math.sqrt(self.radius * self.radius + self.half_height * self.half_height)

    def hit(self, origin: Vector, direction: Points) -> tuple[Float[np.ndarray, " N"], Points]:
        """The round side, or else the disc on top."""
        x, y, z = origin
        side = _quadratic(
            direction[0] * direction[0] + direction[1] * direction[1],
            direction[0] * x + direction[1] * y,
            np.asarray([x * x + y * y - self.radius * self.radius]),
        )
        reached = np.where(np.isfinite(side), side, 0.0)
        side = np.where(np.abs(z + reached * direction[2]) > self.half_height, np.inf, side)
        top = (self.half_height - z) / np.where(direction[2] < -SMALL, direction[2], -SMALL)
        across, deep = x + top * direction[0], y + top * direction[1]
        capped = (top > 0) & (across * across + deep * deep < self.radius * self.radius)
        top = np.where(capped, top, np.inf)
        round_normal = np.stack(
            [x + reached * direction[0], y + reached * direction[1], np.zeros_like(reached)]
        )
        up = np.where(np.arange(3)[:, None] == 2, 1.0, 0.0)
        return np.minimum(side, top), np.where(top < side, up, round_normal / self.radius)


Solid = Block | Ball | Post


class Placed(NamedTuple):
    """A solid in the room: where its centre is and how it is turned about the vertical."""

    solid: Solid
    centre: Vector
    turn: tuple[float, float]  # cosine, sine


class Hits(NamedTuple):
    """What each ray meets first. Surfaces: 0 floor, 1 ceiling, 2..5 walls, 6... the solids."""

    distance: Float[np.ndarray, " N"]
    normal: Points
    texture: Float[np.ndarray, "2 N"]  # metres on the surface
    surface: Int[np.ndarray, " N"]


def trace(room: Vector, solids: list[Placed], origin: Vector, direction: Points) -> Hits:
    """Meet the nearest surface along each ray from `origin`, which lies inside the room."""
    hits = _room(room, origin, direction)
    for index, placed in enumerate(solids):
        rays = np.flatnonzero(_may_hit(placed, origin, direction))
        start, along = _into_frame(placed, origin, direction[:, rays])
        distance, normal = placed.solid.hit(start, along)
        closer = distance < hits.distance[rays]
        rays, distance, normal = rays[closer], distance[closer], normal[:, closer]
        hits.distance[rays] = distance
        hits.normal[:, rays] = _turned(normal, placed.turn)
        hits.texture[:, rays] = _flatten(column(start) + distance * along[:, closer], normal)
        hits.surface[rays] = 6 + index
    return hits


def dot(
    left: Float[np.ndarray, "3 #N"], right: Float[np.ndarray, "3 #N"]
) -> Float[np.ndarray, " ..."]:
    """Scalar products, summed in one fixed order."""
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def column(vector: Vector) -> Float[np.ndarray, "3 1"]:
    """One vector beside many points."""
    return np.asarray(vector, dtype=np.float64)[:, None]


@dataclass(frozen=True)
class Material:
    """Two colours (linear, 0..1) in a pattern of a size in metres, inside a frame."""

    pattern: Literal["plain", "checker", "stripes", "tiles", "clouds"]
    size: float
    colour: Vector
    second: Vector
    frame: Vector
    inside: tuple[float, float]  # half width and half height within the frame; inf = no frame


def paint(hits: Hits, materials: list[Material]) -> Points:
    """Colours of the surfaces before light falls on them; `materials` by surface number."""
    table = {
        field.name: np.asarray([getattr(material, field.name) for material in materials])
        for field in fields(Material)
    }
    of = hits.surface
    across, up = hits.texture / table["size"][of]
    clouds = _clouds(across, up, of)
    column_, row = np.floor(across), np.floor(up)
    joint = (across - column_ < 0.1) | (up - row < 0.1)
    weights = {
        "plain": np.zeros_like(clouds),
        "checker": (column_ + row) % 2,
        "stripes": column_ % 2,
        "tiles": joint.astype(np.float64),
        "clouds": clouds,
    }
    pattern = np.asarray([PATTERNS.index(material.pattern) for material in materials])[of]
    weight = np.choose(pattern, [weights[name] for name in PATTERNS])
    colour = table["colour"][of] + (table["second"] - table["colour"])[of] * weight[:, None]
    framed = np.any(np.abs(hits.texture) > table["inside"][of].T, axis=0)
    colour = np.where(framed[:, None], table["frame"][of], colour)
    return (colour * (0.85 + 0.3 * clouds[:, None])).T


def _quadratic(
    a: Float[np.ndarray, " N"], half_b: Float[np.ndarray, " N"], c: Float[np.ndarray, " 1"]
) -> Float[np.ndarray, " N"]:
    """The smaller root of a t^2 + 2 half_b t + c, where it exists and is positive; else inf."""
    a = np.maximum(a, SMALL)
    inside = half_b * half_b - a * c
    enter = (-half_b - np.sqrt(np.maximum(inside, 0.0))) / a
    return np.where((inside > 0) & (enter > 0), enter, np.inf)


def _room(room: Vector, origin: Vector, direction: Points) -> Hits:
    steep = np.where(np.abs(direction) < SMALL, SMALL, direction)
    away = np.greater(steep, 0)
    leave = (np.where(away, column(room), 0.0) - column(origin)) / steep
    axis = leave.argmin(axis=0)
    distance = leave.min(axis=0)
    normal = np.where(np.arange(3)[:, None] == axis, -np.sign(steep), 0.0)
    surface = np.choose(axis, [2, 4, 0]) + np.choose(axis, away)
    point = column(origin) + distance * direction
    return Hits(distance, normal, _flatten(point, normal), surface)


def _may_hit(placed: Placed, origin: Vector, direction: Points) -> Bool[np.ndarray, " N"]:
    """Whether rays pass the sphere around the solid: most miss it, and this is cheap."""
    offset = column(placed.centre) - column(origin)
    beyond = dot(offset, offset) - placed.solid.reach * placed.solid.reach
    toward = dot(direction, offset)
    passes = (toward > 0) & (toward * toward >= dot(direction, direction) * beyond)
    return passes | (beyond <= 0)


def _into_frame(placed: Placed, origin: Vector, direction: Points) -> tuple[Vector, Points]:
    cosine, sine = placed.turn
    back = (cosine, -sine)
    offset = column(origin) - column(placed.centre)
    x, y, z = _turned(offset, back)[:, 0].tolist()
    return (x, y, z), _turned(direction, back)


def _turned(points: Points, turn: tuple[float, float]) -> Points:
    cosine, sine = turn
    x, y, z = points
    return np.stack([cosine * x - sine * y, sine * x + cosine * y, z])


def _flatten(point: Points, normal: Points) -> Float[np.ndarray, "2 N"]:
    """Texture coordinates: the point seen along the axis its surface faces most."""
    facing = np.abs(normal).argmax(axis=0)
    across = np.where(facing == 0, point[1], point[0])
    return np.stack([across, np.where(facing == 2, point[1], point[2])])


def _clouds(
    across: Float[np.ndarray, " N"], up: Float[np.ndarray, " N"], surface: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Two octaves of value noise, 0..1, different on each surface."""
    coarse = _value_noise(across * 2.0, up * 2.0, surface)
    return 0.6 * coarse + 0.4 * _value_noise(across * 7.0, up * 7.0, surface + 100)


def _value_noise(
    across: Float[np.ndarray, " N"], up: Float[np.ndarray, " N"], salt: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    left, below = np.floor(across), np.floor(up)
    x, y = across - left, up - below
    column_, row = left.astype(np.int64), below.astype(np.int64)
    corner = [[_hash(column_ + i, row + j, salt) for i in (0, 1)] for j in (0, 1)]
    lower = corner[0][0] + (corner[0][1] - corner[0][0]) * x
    upper = corner[1][0] + (corner[1][1] - corner[1][0]) * x
    return lower + (upper - lower) * y


def _hash(
    column_: Int[np.ndarray, " N"], row: Int[np.ndarray, " N"], salt: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """A number in 0..1 that looks random; large odd factors spread neighbouring cells apart."""
    mixed = (column_ * 73_856_093) ^ (row * 19_349_663) ^ (salt * 83_492_791)
    mixed = (mixed & 0xFFFFFF) * 2_654_435_761 & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) & 0xFFFFFFFF
    return (mixed >> 8) / 16_777_216.0
