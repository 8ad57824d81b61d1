"""What stands in a generated room, what it is covered with, and where the viewer stands.

All draws come from one RandomState as random_sample() and randint(), whose streams never change,
and angles are rational (`turn`): see raycast.py for why.
"""

from typing import NamedTuple

import numpy as np

from segmill.data.raycast import PATTERNS, Ball, Block, Material, Placed, Post, Solid, Vector

WALL, FLOOR, CEILING, BOX, BALL, POST, DOOR, PICTURE = range(8)
UNFRAMED = (float("inf"), float("inf"))
UPRIGHT = (1.0, 0.0)
FLAT = 0.002  # half the thickness of a painted ball


class Thing(NamedTuple):
    """A solid, its class, and the half width and height inside its frame."""

    placed: Placed
    label: int
    inside: tuple[float, float]


class Camera(NamedTuple):
    """Position, axes of length one, and focal length in image widths."""

    position: Vector
    forward: Vector
    right: Vector
    up: Vector
    focal: float


class Footprint(NamedTuple):
    """The disc a thing covers on the floor."""

    x: float
    y: float
    radius: float


def between(rng: np.random.RandomState, low: float, high: float) -> float:
    """Not rng.uniform: its multiply-add may be fused, and rounded otherwise, on some machines."""
    return low + (high - low) * rng.random_sample()


def turn(half_tangent: float) -> tuple[float, float]:
    """Cosine and sine from the tangent of half the angle, without a library's cos and sin."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def empty_room(rng: np.random.RandomState) -> Vector:
    """Width, length and height in metres."""
    return between(rng, 4.0, 6.5), between(rng, 4.0, 6.5), between(rng, 2.4, 3.2)


def viewer(rng: np.random.RandomState, room: Vector) -> Camera:
    """Near the front wall, looking across the room, mostly a little down."""
    share = between(rng, 0.25, 0.75)
    position = (share * room[0], between(rng, 0.3, 0.8), between(rng, 1.2, 1.8))
    # Up to 30 degrees to either side of the middle of the room.
    cos_yaw, sin_yaw = turn(between(rng, -0.27, 0.27) + 0.25 * (share - 0.5))
    cos_pitch, sin_pitch = turn(between(rng, -0.11, 0.03))
    return Camera(
        position=position,
        forward=(-sin_yaw * cos_pitch, cos_yaw * cos_pitch, sin_pitch),
        right=(cos_yaw, sin_yaw, 0.0),
        up=(sin_yaw * sin_pitch, -cos_yaw * sin_pitch, cos_pitch),
        focal=between(rng, 0.58, 0.75),
    )


def furnish(rng: np.random.RandomState, room: Vector, camera: Camera) -> list[Thing]:
    """Everything in the room but its own walls, floor and ceiling."""
    return [*_panels(rng, room), *_standing(rng, room, camera), *_painted_balls(rng, room, camera)]


def cover(rng: np.random.RandomState, things: list[Thing]) -> list[Material]:
    """Materials of floor, ceiling, the four walls and the things, in raycast's surface order."""
    walls = _material(rng, UNFRAMED)
    floor, ceiling = _material(rng, UNFRAMED), _material(rng, UNFRAMED)
    return [floor, ceiling, *[walls] * 4, *(_material(rng, thing.inside) for thing in things)]


def _panels(rng: np.random.RandomState, room: Vector) -> list[Thing]:
    """One or two doors and up to five pictures on the three walls in view, none over another."""
    panels: list[Thing] = []
    taken: list[tuple[int, float, float]] = []  # wall, middle, half width
    doors, pictures = int(rng.randint(1, 3)), int(rng.randint(2, 6))
    for label in [DOOR] * doors + [PICTURE] * pictures:
        if label == DOOR:
            width, height = between(rng, 0.4, 0.55), between(rng, 0.98, 1.08)
            centre_height, border = height, 0.08
        else:
            width, height = between(rng, 0.2, 0.55), between(rng, 0.2, 0.4)
            centre_height, border = between(rng, 1.4, 1.8), 0.05
        wall = int(rng.randint(3))  # left, far, right
        length, start = (room[0], 0.1) if wall == 1 else (room[1], 1.6)
        middle = between(rng, start + width, length - 0.1 - width)
        if any(wall == w and abs(middle - m) < width + half + 0.1 for w, m, half in taken):
            continue
        taken.append((wall, middle, width))
        panel = _on_wall(room, wall, middle, centre_height, Block((width, 0.04, height)))
        panels.append(Thing(panel, label, (width - border, height - border)))
    return panels


def _on_wall(room: Vector, wall: int, middle: float, height: float, solid: Solid) -> Placed:
    """Half sunk into the left (0), far (1) or right (2) wall; the solid's y is its thickness."""
    if wall == 1:
        return Placed(solid, (middle, room[1], height), UPRIGHT)
    return Placed(solid, (0.0 if wall == 0 else room[0], middle, height), (0.0, 1.0))


def _standing(rng: np.random.RandomState, room: Vector, camera: Camera) -> list[Thing]:
    """Boxes, posts and balls that stand apart from each other; some balls lie on boxes."""
    counts = {BOX: int(rng.randint(2, 6)), POST: int(rng.randint(1, 4))}
    things: list[Thing] = []
    taken: list[Footprint] = []
    for label in [label for label, count in counts.items() for _ in range(count)]:
        solid, footprint = _upright(rng, label, room[2]), _spot(rng, camera)
        footprint = footprint._replace(radius=_spread(solid))
        spin = turn(between(rng, -1.0, 1.0)) if label == BOX else UPRIGHT
        if _is_free(footprint, taken, room):
            taken.append(footprint)
            centre = (footprint.x, footprint.y, _half_height(solid))
            things.append(Thing(Placed(solid, centre, spin), label, UNFRAMED))
    boxes = [thing.placed for thing in things if thing.label == BOX]
    for _ in range(int(rng.randint(2, 5))):
        radius = between(rng, 0.12, 0.35)
        spot, on_box = _spot(rng, camera)._replace(radius=radius), rng.random_sample() < 0.3
        ball = Ball((radius, radius, radius))
        if on_box and boxes:
            x, y, z = boxes.pop().centre
            things.append(Thing(Placed(ball, (x, y, 2 * z + radius), UPRIGHT), BALL, UNFRAMED))
        elif _is_free(spot, taken, room):
            taken.append(spot)
            things.append(Thing(Placed(ball, (spot.x, spot.y, radius), UPRIGHT), BALL, UNFRAMED))
    return things


def _upright(rng: np.random.RandomState, label: int, ceiling: float) -> Block | Post:
    """A box of up to a metre, or a post that is often as high as the room."""
    first, second, third = (rng.random_sample() for _ in range(3))
    if label == BOX:
        return Block((0.15 + 0.35 * first, 0.15 + 0.35 * second, 0.1 + 0.45 * third))
    whole = second < 0.6
    return Post(0.06 + 0.1 * first, ceiling / 2 if whole else 0.4 + 0.5 * third)


def _half_height(solid: Block | Post) -> float:
    return solid.half[2] if isinstance(solid, Block) else solid.half_height


def _spread(solid: Block | Post) -> float:
    """Radius of the disc that the solid covers however it is turned (a bound on the diagonal)."""
    return max(solid.half[:2]) * 1.42 if isinstance(solid, Block) else solid.radius


def _spot(rng: np.random.RandomState, camera: Camera) -> Footprint:
    """A place on the floor that the viewer sees."""
    ahead = between(rng, 1.5, 5.0)
    aside = between(rng, -0.6, 0.6) * ahead
    x = camera.position[0] + ahead * camera.forward[0] + aside * camera.right[0]
    y = camera.position[1] + ahead * camera.forward[1] + aside * camera.right[1]
    return Footprint(x, y, 0.0)


def _is_free(new: Footprint, taken: list[Footprint], room: Vector) -> bool:
    margin = new.radius + 0.1
    inside = margin < new.x < room[0] - margin and margin < new.y < room[1] - margin
    return inside and all(
        (new.x - old.x) * (new.x - old.x) + (new.y - old.y) * (new.y - old.y)
        > (new.radius + old.radius) * (new.radius + old.radius)
        for old in taken
    )


def _painted_balls(rng: np.random.RandomState, room: Vector, camera: Camera) -> list[Thing]:
    """Up to three pictures of balls, straight on the wall or on the floor, part of it by label."""
    things = []
    for _ in range(int(rng.randint(0, 4))):
        radius, wall = between(rng, 0.12, 0.35), int(rng.randint(4))
        middle, height = between(rng, 0.35, 0.9), between(rng, 0.5, 1.8)
        spot = _spot(rng, camera)
        if wall < 3:
            ball = Ball((radius, FLAT, radius))
            length = room[0] if wall == 1 else room[1]
            things.append(
                Thing(_on_wall(room, wall, middle * length, height, ball), WALL, UNFRAMED)
            )
        elif _is_free(spot._replace(radius=radius), [], room):
            ball = Ball((radius, radius, FLAT))
            things.append(Thing(Placed(ball, (spot.x, spot.y, 0.0), UPRIGHT), FLOOR, UNFRAMED))
    return things


def _material(rng: np.random.RandomState, inside: tuple[float, float]) -> Material:
    """One urn for all classes: a colour, a related or unrelated second one, a pattern."""
    colour, second, frame = _colour(rng), _colour(rng), _colour(rng)
    if rng.random_sample() < 0.6:  # the second is a shade of the first
        shade = between(rng, 0.6, 1.4)
        second = (shade * colour[0], shade * colour[1], shade * colour[2])
    pattern = PATTERNS[int(rng.randint(len(PATTERNS)))]
    return Material(pattern, between(rng, 0.12, 0.5), colour, second, frame, inside)


def _colour(rng: np.random.RandomState) -> Vector:
    """Linear light, mostly muted: a grey mixed with up to 70 % of a pure colour."""
    grey, strength = between(rng, 0.1, 0.7), between(rng, 0.0, 0.7)
    red, green, blue = (
        grey + strength * (float(part) * 0.8 - grey) for part in rng.random_sample(3)
    )
    return red, green, blue
