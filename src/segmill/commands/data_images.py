"""`segmill data check` of images with one label: every task's folder, and every image decoded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from segmill.configuration import Invocation, build
from segmill.data.classes import read_classes
from segmill.data.classification_data import ImageSource
from segmill.data.files import DataError
from segmill.data.labelled_image import LabelledImages
from segmill.data.tasks import Task, tasks_of
from segmill.errors import SegmillError

_SHOWN = 200


def check_images(config: DictConfig, context: Invocation) -> None:
    """Print what every task holds; raise SegmillError when anything is wrong."""
    data, console, problems = config.data, Console(), list[str]()
    source: ImageSource = build(data.source)
    tasks = tasks_of(data.corruptions, data.severities)
    source.require_tasks(tasks, on_the_fly=data.on_the_fly)
    names = _class_names(config, source, tasks[0], problems)
    first: tuple[Task, set[str]] | None = None
    with Progress(console=console, transient=True) as progress:
        for task in tasks:
            try:
                images = source.images(task, names or source.class_names(task))
            except DataError as error:
                problems.append(str(error))
                continue
            found = {images.name(index) for index in range(len(images))}
            first = first or (task, found)
            if found != first[1]:
                problems.append(_other_images(task, found, *first))
            bar = progress.add_task(task.name, total=-(-len(images) // config.every))
            sizes = _sizes(images, config.every, problems, lambda bar=bar: progress.advance(bar))
            shown = ", ".join(f"{w} x {h} ({count})" for (w, h), count in sizes.most_common(4))
            console.print(f"{task.name}: {len(images)} images; size {shown}", highlight=False)
    if first is None:  # no task can be opened: the first one says why
        del problems[1:]
    for problem in problems[:_SHOWN]:
        console.print(f"[red]problem[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if problems:
        more = f" ({len(problems) - _SHOWN} of them not printed)" if len(problems) > _SHOWN else ""
        raise SegmillError(
            f"{len(problems)} problem(s) in data={data.name}{more}, listed above with what to do. "
            f"Then again: {context.command}"
        )
    console.print(f"No problem found. Next: segmill adapt data={data.name}", highlight=False)


def _class_names(
    config: DictConfig, source: ImageSource, task: Task, problems: list[str]
) -> tuple[str, ...] | None:
    """The classes that every task should have; None if there are others than expected."""
    known, count = read_classes(config.data.classes).names, config.data.num_classes
    if len(known) == count:
        return known
    try:
        found = source.class_names(task)
    except DataError:
        return None  # said where the task is opened
    if len(found) != count:
        problems.append(
            f"data.num_classes={count}, but the images of task {task.name} are of {len(found)} "
            f"classes. Set data.num_classes={len(found)} if these are all."
        )
    return found


def _other_images(task: Task, found: set[str], first: Task, expected: set[str]) -> str:
    differing = [
        f"{len(names)} that {has.name} has (the first: {min(names)}) and {lacks.name} lacks"
        for has, lacks, names in ((first, task, expected - found), (task, first, found - expected))
        if names
    ]
    return (
        f"All tasks should show the same images, but there are {', and '.join(differing)}. "
        "Unpack the folder again, or take away what does not belong there."
    )


def _sizes(
    images: LabelledImages, every: int, problems: list[str], done: Callable[[], None]
) -> Counter[tuple[int, int]]:
    """(width, height) of each `every`-th image; those that cannot be read become problems."""
    sizes: Counter[tuple[int, int]] = Counter()

    def look(index: int) -> tuple[int, int] | str:
        try:
            height, width = images[index].image.shape[:2]
        except DataError as error:
            return str(error)
        return width, height

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for seen in pool.map(look, range(0, len(images), every)):
            done()
            if isinstance(seen, str):
                problems.append(seen)
            else:
                sizes[seen] += 1
    return sizes
