"""What of a file fits a network: loaded, missing, unused, wrong shape. Nothing passes in silence.

One rule for counters: `num_batches_tracked` of a BatchNorm counts steps and holds nothing learned
(it matters only for momentum=None, which no model here uses). Files of other libraries often lack
it, so it is loaded when present, and neither missing nor unused otherwise.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Shaped

from segmill.checkpoint.storage import CheckpointError

COUNTER = re.compile(r"(.*\.)?num_batches_tracked")
SHOWN = 12


@dataclass(frozen=True)
class Report:
    """Names in the network's order (`unused`: in the file's). `wrong_shape`: name, file, network.

    `excused` are the missing and unused names that the caller allowed.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    excused: tuple[str, ...] = ()

    @property
    def problems(self) -> int:
        """How many names do not fit."""
        return len(self.missing) + len(self.unused) + len(self.wrong_shape)

    def excuse(self, may_miss: Iterable[str], may_leave: Iterable[str]) -> "Report":
        """The report without the missing and unused names that match a whole-key pattern."""
        missing = tuple(name for name in self.missing if not _matches(name, may_miss))
        unused = tuple(name for name in self.unused if not _matches(name, may_leave))
        kept = {*missing, *unused}
        excused = tuple(name for name in (*self.missing, *self.unused) if name not in kept)
        return replace(self, missing=missing, unused=unused, excused=self.excused + excused)

    def raise_unless_allowed(self, may_miss: Iterable[str], may_leave: Iterable[str]) -> None:
        """Refuse unless every problem matches: `may_miss` in the file, `may_leave` in the network.

        A wrong shape is never excused: `may_miss` and `may_leave` both have to name it.
        """
        may_miss, may_leave = tuple(may_miss), tuple(may_leave)
        rest = self.excuse(may_miss, may_leave)
        shapes = tuple(
            entry
            for entry in rest.wrong_shape
            if not (_matches(entry[0], may_miss) and _matches(entry[0], may_leave))
        )
        rest = replace(rest, wrong_shape=shapes)
        if rest.problems:
            raise CheckpointError(
                f"The weights do not fit.\n{rest.text()}\nTo load them all the same, name each "
                "exception: may_miss=[REGEX, ...] for what the file lacks, may_leave=[REGEX, ...] "
                "for what the network has no place for (both for a wrong shape)."
            )

    def text(self) -> str:
        """Counts, then the first names of each kind."""
        counts = (
            f"{len(self.loaded)} loaded, {len(self.missing)} missing, {len(self.unused)} unused, "
            f"{len(self.wrong_shape)} of wrong shape"
        )
        excused = f", {len(self.excused)} excused" if self.excused else ""
        shapes = [
            f"{name}: file {theirs}, network {ours}" for name, theirs, ours in self.wrong_shape
        ]
        sections = [
            ("missing in the file", self.missing),
            ("unused from the file", self.unused),
            ("of wrong shape", shapes),
        ]
        lines = [line for title, names in sections for line in _section(title, names)]
        return "\n".join([counts + excused, *lines])


def compare(
    arrays: Mapping[str, Shaped[np.ndarray, "..."]], shapes: Mapping[str, tuple[int, ...]]
) -> Report:
    """Hold the arrays of a file (already renamed) against the network's {name: shape}."""
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    return Report(
        loaded=tuple(name for name, shape in shapes.items() if found.get(name) == shape),
        missing=tuple(n for n in shapes if n not in found and not COUNTER.fullmatch(n)),
        unused=tuple(n for n in found if n not in shapes and not COUNTER.fullmatch(n)),
        wrong_shape=tuple(
            (name, found[name], shape)
            for name, shape in shapes.items()
            if name in found and found[name] != shape
        ),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _section(title: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = [f"  ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"{len(names)} {title}:", *(f"  {name}" for name in names[:SHOWN]), *more]
