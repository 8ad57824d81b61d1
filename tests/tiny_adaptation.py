"""`segmill adapt` small enough for tests: rooms of 64 x 96, a tiny SegFormer, a tiny random SD3."""

import os
import subprocess
import sys
from pathlib import Path

import cv2

from segmill.cli import main
from segmill.data.scenes import ray_cast
from segmill.tta.results import TaskResult, load_task

TASKS = ("01_gaussian_noise_5", "02_contrast_5")
# With windows of 64 pixels, 32 apart: two, two, one and three of them.
SHAPES = ((64, 96), (96, 64), (64, 64), (64, 128))


def tiny_adapt_words(folder: Path, **changes: object) -> list[str]:
    """The words after `segmill adapt`; `changes` are further key=value, dots written as __."""
    words = [
        "data=scenes_c",
        f"data.data_root={folder / 'scenes'}",
        "data.generate.train=1",
        "data.generate.val=1",
        "data.generate.test=3",
        "data.generate.height=64",
        "data.generate.width=96",
        "data.corruptions=[gaussian_noise,contrast]",
        "model/discriminative=segformer_tiny",
        "model/generative=sd3_tiny",
        "weights=random",
        "trainer=adapt_cpu",
        "pictures=1",
        f"output_dir={folder / 'runs'}",
        "experiment.name=tiny",
    ]
    names = {key: key.replace("___", "/").replace("__", ".") for key in changes}
    return words + [f"{names[key]}={value}" for key, value in changes.items()]


def adapt_tiny(folder: Path, **changes: object) -> Path:
    """Adapt through the command line, in this process; returns the run folder."""
    status = main(["adapt", *tiny_adapt_words(folder, **changes), "--trace"])
    assert status == 0
    return folder / "runs" / str(changes.get("experiment__name", "tiny"))


def start_adapt(folder: Path, **changes: object) -> "subprocess.Popen[str]":
    """The same as a process of its own, which several ranks need."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "segmill", "adapt", *tiny_adapt_words(folder, **changes)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def write_shapes(folder: Path) -> None:
    """Test images of `SHAPES` where `tiny_adapt_words` looks; use with data.generate=null."""
    for seed, (height, width) in enumerate(SHAPES):
        scene = ray_cast(seed, height=height, width=width)
        pictures = {"images": scene.image[..., ::-1], "labels": scene.label}
        for kind, pixels in pictures.items():
            path = folder / "scenes" / kind / "test" / f"{seed:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)


def results_of(run: Path, row: str, tasks: tuple[str, ...] = TASKS) -> list[TaskResult]:
    """What a row of the comparison left, task by task."""
    found = [load_task(run / row, task) for task in tasks]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]
