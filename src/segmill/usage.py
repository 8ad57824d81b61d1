"""Help texts, made from the table of commands and the folders of the configuration tree."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from segmill.options import fitting
from segmill.paths import CONFIGS
from segmill.verbs import VERBS

WIDTH = 100
MANY, FEW = 40, 8  # options of a group in a help text
FLAGS_HELP = """\
Flags
  -h, --help    this text, or that of a command
  --dry-run     train: the whole plan and one real step, nothing written
  --verify      corrupt: read every file again and list what is missing or changed
  --trace       show where an error comes from
  --version     the version"""


def overview() -> str:
    """`segmill --help`."""
    width = max(map(len, VERBS)) + 2
    rows = [f"  {name:{width}}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "segmill: train, evaluate, load and adapt semantic segmentation models.",
            "",
            "Usage: segmill COMMAND [GROUP=OPTION ...] [key=value ...] [FLAG ...]",
            "",
            "Commands",
            *rows,
            "",
            FLAGS_HELP,
            "",
            "Examples",
            *(f"  {VERBS[name].examples[0]}" for name in ("demo", "train", "eval", "predict")),
            "",
            "Next: segmill COMMAND --help, or segmill doctor",
        ]
    )


def verb_help(name: str) -> str:
    """`segmill COMMAND --help`: usage, keys, the options of its groups, examples."""
    verb = VERBS[name]
    lines = [f"segmill {name}: {verb.summary}.", "", f"Usage: {verb.usage}"]
    if verb.keys:
        width = max(len(key) for key, _ in verb.keys) + 2
        lines += ["", "Keys", *(f"  {key:{width}}{text}" for key, text in verb.keys)]
    if verb.config is not None:
        lines += [f"  Every key: configs/{verb.config}.yaml and the files of its groups"]
        lines += _groups(verb.config)
    lines += ["", "Examples", *(f"  {example}" for example in verb.examples)]
    if verb.dry_run:
        lines += ["", "With --dry-run: the whole plan and one real step, nothing written."]
    return "\n".join(lines)


def _shown(found: Mapping[str, str]) -> str:
    """The options of a group; of very many the first ones, those outside subfolders before all."""
    names = sorted(found, key=lambda name: ("/" in found[name], name))
    if len(names) <= MANY:
        return ", ".join(names) or "(none yet)"
    return f"{', '.join(names[:FEW])}, ... ({len(names)}: segmill models)"


def _groups(config: str) -> list[str]:
    """The groups of a root file with their options, read without a YAML parser."""
    text = (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8")
    entries = [line.strip().removeprefix("- ") for line in text.splitlines() if "  - " in line]
    pairs = [entry.partition("#")[0].partition(":") for entry in entries]
    names = [name for name, colon, _ in pairs if colon]
    if not names:
        return []
    lines = ["", "Groups"]
    for name in names:
        listed = _shown(fitting(config, name))
        lines += textwrap.wrap(
            f"  {name}= {listed}", WIDTH, subsequent_indent="      ", break_on_hyphens=False
        )
    return lines
