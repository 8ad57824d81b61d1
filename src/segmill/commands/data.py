"""`segmill data check`: every bad file and the pixels per class; `data new`: write the YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from segmill.commands.data_images import check_images
from segmill.configuration import Invocation, build
from segmill.data.check import DataReport, check_dataset
from segmill.data.classes import Classes, read_classes
from segmill.data.files import DataError
from segmill.data.folder import FolderDataset
from segmill.data.guess import Guess, guess
from segmill.errors import SegmillError
from segmill.files import write_whole
from segmill.paths import CONFIGS

# The keys of a data YAML that FolderDataset takes as they are.
_FILES = ["data_root", "image", "label", "splits", "label_map", "label_format"]
_SIZES_SHOWN, _PROBLEMS_SHOWN = 4, 200


def run_check(config: DictConfig, context: Invocation) -> None:
    """Print what is in every split; raise SegmillError when anything is wrong."""
    if config.every < 1:
        raise SegmillError(f"every={config.every}: it must be 1 (every sample) or more.")
    if "source" in config.data:  # one label an image
        check_images(config, context)
        return
    keys: dict[str, Any] = OmegaConf.to_container(config.data, resolve=True)  # type: ignore[assignment]
    write_generated(keys)
    console = Console()
    classes = read_classes(keys["classes"])
    reports, problems = _look(keys, classes, config.every, console)
    if len(classes) != keys["num_classes"]:
        problems.append(
            f"data.num_classes={keys['num_classes']}, but data.classes={keys['classes']} has "
            f"{len(classes)} classes. Set data.num_classes={len(classes)}, or correct the file."
        )
    if reports:
        console.print(_class_table(classes, reports, title=f"{keys['name']}: pixels per class"))
    for split, report in reports.items():
        console.print(f"{split}: {described(report)}", highlight=False)
    for problem in problems[:_PROBLEMS_SHOWN]:
        console.print(f"[red]problem[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    if problems:
        hidden = len(problems) - _PROBLEMS_SHOWN
        more = f" ({hidden} of them not printed)" if hidden > 0 else ""
        raise SegmillError(
            f"{len(problems)} problem(s) in data={keys['name']}{more}, listed above with what to "
            f"do. Then again: {context.command}"
        )
    console.print(f"No problem found. Next: segmill train data={keys['name']}", highlight=False)


def write_generated(keys: Mapping[str, Any]) -> None:
    """Write the data sets that are made here; nothing where `generate` is null."""
    if keys["generate"] is not None:
        generated = build(keys["generate"])
        if callable(generated):
            generated()


def run_new(folder: Path, name: str | None = None) -> None:
    """Write configs/data/NAME.yaml and configs/classes/NAME.csv of the current folder."""
    found = guess(folder)
    name = name or folder.resolve().name
    keys, classes = Path("configs/data") / f"{name}.yaml", Path("configs/classes") / f"{name}.csv"
    for path in (keys, classes):
        if path.exists():
            raise SegmillError(f"{path} exists already. Give another name: name=NAME.")
    write_whole(keys, _yaml(name, folder.resolve(), found).encode())
    write_whole(classes, _class_rows(len(found.values)).encode())
    Console().print(
        f"Wrote {keys} and {classes} ({len(found.values)} classes, values "
        f"{', '.join(map(str, found.values))}). Write the real names into {classes}.\n"
        f"Next: segmill data check data={name}",
        highlight=False,
        soft_wrap=True,
    )


def described(report: DataReport) -> str:
    """Samples, image sizes and depth in one line."""
    sizes = report.sizes.most_common(_SIZES_SHOWN)
    text = ", ".join(f"{width} x {height} ({count})" for (width, height), count in sizes)
    others = len(report.sizes) - len(sizes)
    parts = [f"{report.samples} samples", f"size {text or '-'}"]
    if others:
        parts.append(f"{others} other sizes")
    if report.depth_zero is not None:
        parts += _described_depth(report.depth_zero, report)
    return "; ".join(parts)


def _described_depth(zero: float, report: DataReport) -> Iterator[str]:
    as_it_is = " (8 bit, as it is)" if report.depth_as_it_is else ""
    if report.depth_range is not None:
        yield f"depth {report.depth_range[0]} to {report.depth_range[1]}{as_it_is}"
    meaning = "is 0, nearest or not measured" if report.depth_as_it_is else "not measured"
    yield f"{zero:.1%} of the depth {meaning}"


def _look(
    keys: Mapping[str, Any], classes: Classes, every: int, console: Console
) -> tuple[dict[str, DataReport], list[str]]:
    reports, problems = {}, []
    splits = [keys["train_split"], keys["val_split"], keys["test_split"]]
    with Progress(console=console, transient=True) as progress:
        for split in dict.fromkeys(each for each in splits if each is not None):
            try:
                dataset = _dataset(keys, classes, split)
                task = progress.add_task(split, total=-(-len(dataset) // every))
                reports[split] = check_dataset(
                    dataset,
                    every=every,
                    progress=lambda done, task=task: progress.update(task, completed=done),
                )
            except DataError as error:
                problems.append(str(error))
                continue
            problems += reports[split].problems
    return reports, list(dict.fromkeys(problems))


def _dataset(keys: Mapping[str, Any], classes: Classes, split: str) -> FolderDataset:
    with_depth = keys["channels"] == 4
    return build(
        {
            "_target_": "segmill.data.folder.FolderDataset",
            **{key: keys[key] for key in _FILES},
            "depth": keys["depth"] if with_depth else None,
            "depth_range": keys["depth_range"] if with_depth else None,
        },
        split=split,
        classes=classes,
    )


def _class_table(classes: Classes, reports: Mapping[str, DataReport], *, title: str) -> Table:
    table = Table(title=title, box=SIMPLE)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("class")
    for split in reports:
        table.add_column(split, justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
    for index, (name, colour) in enumerate(zip(classes.names, classes.palette, strict=True)):
        red, green, blue = colour.tolist()
        pixels = [int(report.pixels[index]) for report in reports.values()]
        mark = f"[rgb({red},{green},{blue})]■[/]"
        table.add_row(str(index), f"{mark} {name}", *_cells(pixels, reports))
    table.add_section()
    ignored = [report.ignored for report in reports.values()]
    table.add_row("255", "ignored", *_cells(ignored, reports))
    return table


def _cells(pixels: Sequence[int], reports: Mapping[str, DataReport]) -> Iterator[str]:
    for count, report in zip(pixels, reports.values(), strict=True):
        total = int(report.pixels.sum()) + report.ignored
        yield f"{count:,}" if count else "[yellow]0"
        yield f"{count / total:.2%}" if total else "-"


def _yaml(name: str, root: Path, found: Guess) -> str:
    """The guessed keys; sizes and training keys are those of configs/data/folder.yaml."""
    label_map: dict[int, int | str] = {value: index for index, value in enumerate(found.values)}
    guessed = {
        "_target_": "segmill.data.datamodule.SegmentationData",
        "name": name,
        "data_root": str(root),
        "image": found.image,
        "label": found.label,
        "depth": found.depth,
        "depth_range": found.depth_range,
        "splits": found.splits,
        "label_map": {**label_map, 255: "ignore"},
        "label_format": found.label_format,
        "classes": name,
        "num_classes": len(found.values),
        "channels": 3 if found.depth is None else 4,
    }
    last = list(found.splits)
    template = (CONFIGS / "data" / "folder.yaml").read_text(encoding="utf-8")
    rest = OmegaConf.create(template)
    assert isinstance(rest, DictConfig)
    rest.merge_with({"val_split": last[1], "test_split": last[-1]})
    for key in guessed:
        rest.pop(key)
    head = f"# {name}: guessed from its files; `segmill data check data={name}` says what is wrong."
    return f"{head}\n{OmegaConf.to_yaml(OmegaConf.create(guessed))}{OmegaConf.to_yaml(rest)}"


def _class_rows(count: int) -> str:
    """Placeholder names, in colours that are easy to tell apart."""
    colours = read_classes("ade20k").palette[:count].tolist()
    rows = [f"class {index},{','.join(map(str, each))}" for index, each in enumerate(colours)]
    return "\n".join(["name,red,green,blue", *rows, ""])
