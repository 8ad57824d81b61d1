"""`segmill corrupt data=NAME out=DIR`: the corrupted images of every task as files, with labels."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
from omegaconf import DictConfig, OmegaConf

from segmill.commands.data import write_generated
from segmill.configuration import Invocation, build
from segmill.data.classes import read_classes
from segmill.data.corrupted_files import (
    MANIFEST,
    Entry,
    Job,
    check_suffix,
    make,
    open_manifest,
    read_manifest,
)
from segmill.data.corruptions import check_corruption
from segmill.data.frost_textures import load_frost
from segmill.data.task_folders import TaskFolders
from segmill.data.tasks import Task, tasks_of
from segmill.errors import SegmillError

log = logging.getLogger(__name__)

# The keys of a data YAML that TaskFolders takes as they are.
_FILES = ["name", "obtain", "data_root", "image", "corrupted", "label", "depth", "depth_range"]
_FILES += ["splits", "split", "label_map", "label_format"]
# What the next command need not repeat: it reads what is written here.
_OF_THE_SOURCE = ("data.data_root", "data.on_the_fly", "data.frost_dir", "data.generate")
_PROBLEMS_SHOWN = 200
_SECONDS = 10.0  # between two lines of progress
_AHEAD = 8  # jobs in front of every process; results are taken in the order of the jobs


def run(config: DictConfig, context: Invocation) -> None:
    """Write or, with `verify`, check; raise SegmillError when files are missing or changed."""
    keys: dict[str, Any] = OmegaConf.to_container(config.data, resolve=True)  # type: ignore[assignment]
    tasks, out = tasks_of(keys["corruptions"], keys["severities"]), Path(config.out)
    workers = _worker_count(config.workers)
    if config.verify:
        _verify(tasks, out, workers, context)
    else:
        if not 1 <= config.quality <= 100:
            raise SegmillError(f"quality={config.quality}: JPEG quality is 1 to 100.")
        _write(_jobs(keys, tasks, out, config.quality), out, workers)
    log.info("Next: %s", _next_command(keys, out, context.overrides))


def _jobs(keys: Mapping[str, Any], tasks: Sequence[Task], out: Path, quality: int) -> list[Job]:
    """Every file: labels, depth and lists first, then task by task."""
    classes = read_classes(keys["classes"])
    node = {"_target_": "segmill.data.task_folders.TaskFolders"}
    folders: TaskFolders = build(node | {key: keys[key] for key in _FILES}, classes=classes)
    folders.require_clean()
    folders.require_distinct(tasks)
    check_suffix(keys["corrupted"])
    frost_dir = None if keys["frost_dir"] is None else Path(keys["frost_dir"])
    for task in tasks:
        check_corruption(task.corruption, task.severity)
        if task.corruption == "frost":
            load_frost(frost_dir)  # once, before the workers are forked
    write_generated(keys)
    earlier = read_manifest(out)

    def job(source: str, path: str, name: str, task: Task | None) -> Job:
        return Job(
            root=keys["data_root"],
            source=source,
            out=out,
            path=path,
            name=name,
            task=task,
            quality=quality,
            frost_dir=frost_dir,
            earlier=earlier.get(path),
        )

    copies: dict[str, Job] = {}
    images: list[Job] = []
    for task in tasks:
        clean = folders.clean(task)
        if clean.list is not None:
            copies[clean.list] = job(clean.list, clean.list, clean.list, None)
        for index in range(len(clean)):
            name = clean.name(index)
            for kind in clean.patterns:
                path = clean.path(index, kind)
                if kind != "image":
                    copies[path] = job(path, path, name, None)
            target = folders.corrupted_path(clean, index, task)
            images.append(job(clean.path(index, "image"), target, name, task))
    _refuse_overwriting(images)
    return [*copies.values(), *images]


def _refuse_overwriting(images: Sequence[Job]) -> None:
    sources = {job.source for job in images}
    inside = Path(images[0].root).resolve() == images[0].out.resolve()
    hit = next((job.path for job in images if inside and job.path in sources), None)
    if hit is not None:
        raise SegmillError(
            f"{images[0].out / hit} is a clean image and would be overwritten: data.corrupted "
            "names the same files as data.image. Change data.corrupted, or out."
        )


def _write(jobs: Sequence[Job], out: Path, workers: int) -> None:
    images = sum(job.task is not None for job in jobs)
    log.info(
        "%d corrupted images, and %d labels and other copies, into %s; %d process(es)",
        images,
        len(jobs) - images,
        out,
        workers,
    )
    started = said = time.monotonic()
    done = written = 0
    with open_manifest(out) as manifest:
        try:
            for job, (entry, is_new) in zip(jobs, _made(jobs, workers), strict=True):
                if entry != job.earlier:
                    manifest.write(entry.line())
                    manifest.flush()
                done, written = done + 1, written + is_new
                if time.monotonic() - said > _SECONDS:
                    said = time.monotonic()
                    left = timedelta(seconds=round((said - started) / done * (len(jobs) - done)))
                    log.info("  %d of %d files, about %s left", done, len(jobs), left)
        except (KeyboardInterrupt, BrokenProcessPool) as error:
            log.info("%d of %d files are there; the same command makes the rest.", done, len(jobs))
            if isinstance(error, BrokenProcessPool):
                raise SegmillError(
                    "A worker process was killed, mostly because memory ran out. Start the same "
                    f"command with fewer: workers={max(1, workers // 2)}"
                ) from error
            raise
    log.info(
        "%d files written, %d were there already. Manifest: %s",
        written,
        done - written,
        out / MANIFEST,
    )


def _made(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Entry, bool]]:
    """`make` of every job, in their order."""
    if workers == 1:
        yield from map(make, jobs)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=fork, initializer=_start_worker)
    ahead: deque[Future[tuple[Entry, bool]]] = deque()
    try:
        for job in jobs:
            ahead.append(pool.submit(make, job))
            if len(ahead) == workers * _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches every process; the first one lets the others finish the image they are at.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # OpenCV's own threads do not survive a fork, and the workers already fill the cores.
    cv2.setNumThreads(0)


def _verify(tasks: Sequence[Task], out: Path, workers: int, context: Invocation) -> None:
    """Read every file of the manifest again, and look for images that a task lacks."""
    entries = list(read_manifest(out).values())
    if not entries:
        raise SegmillError(
            f"There is no manifest {out / MANIFEST}: segmill corrupt has written nothing there. "
            "Correct out."
        )
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda entry: entry.damage(out), entries))
    problems = [each for each in found if each is not None] + _gaps(tasks, entries)
    for problem in problems[:_PROBLEMS_SHOWN]:
        log.info("%s", problem)
    if problems:
        again = [word for word in context.argv if word not in ("--verify", "verify=true")]
        hidden = len(problems) - _PROBLEMS_SHOWN
        more = f" ({hidden} of them not printed)" if hidden > 0 else ""
        raise SegmillError(
            f"{len(problems)} problem(s) among {len(entries)} files in {out}{more}, listed above. "
            f"Make these files again: segmill {shlex.join(again)}"
        )
    log.info("%d files in %s are as they were written.", len(entries), out)


def _gaps(tasks: Sequence[Task], entries: Sequence[Entry]) -> list[str]:
    """Images that one of the tasks has and another one has not."""
    names: dict[tuple[str | None, int | None], set[str]] = defaultdict(set)
    for entry in entries:
        names[entry.recipe.corruption, entry.recipe.severity].add(entry.recipe.name)
    own = {task.name: names[task.corruption, task.severity] for task in tasks}
    every = set().union(*own.values())
    return [
        f"missing: {len(every - found)} of {len(every)} images of {name}"
        if found
        else f"missing: all images of {name}"
        for name, found in own.items()
        if not found or found != every
    ]


def _next_command(keys: Mapping[str, Any], out: Path, overrides: Sequence[str]) -> str:
    """The adaptation that reads what was written."""
    kept = [
        each
        for each in overrides
        if each.startswith(("data=", "data.")) and not each.startswith(_OF_THE_SOURCE)
    ]
    reads = ["data.on_the_fly=false"] if keys["on_the_fly"] else []
    return shlex.join(["segmill", "adapt", *kept, f"data.data_root={out}", *reads])


def _worker_count(workers: int | None) -> int:
    if workers is None:
        linux = sys.platform == "linux"  # elsewhere a process may use every core
        return len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if workers < 1:
        raise SegmillError(f"workers={workers}: at least one process is needed.")
    return workers
