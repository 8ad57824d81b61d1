"""The order of a task's images, and of several tasks in one stream; the same for every method."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from segmill.data.stream import shuffled


def task_places(lengths: Sequence[int], *, limit: int | None, seed: int) -> Int[np.ndarray, "N 2"]:
    """(which task, index of its sample) of every item; several tasks are mixed.

    `limit` takes the first images of every task only, also when tasks are mixed.
    """
    parts = []
    for position, length in enumerate(lengths):
        order = _permutation(length, seed)[:limit]
        parts.append(np.stack([np.full(len(order), position), order], axis=1))
    places = np.concatenate(parts)
    return places if len(lengths) == 1 else places[_permutation(len(places), seed)]


def order_hash(tasks: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Twelve hex digits of (task, names of its images in order) of all tasks."""
    digest = hashlib.sha256()
    for name, images in tasks:
        digest.update("\n".join([name, *images, ""]).encode())
    return digest.hexdigest()[:12]


def _permutation(length: int, seed: int) -> Int[np.ndarray, " N"]:
    return np.array([shuffled(position, length, seed) for position in range(length)], np.int64)
