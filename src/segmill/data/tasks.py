"""Tasks of test-time adaptation: one corruption at one severity each, in a fixed order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from segmill.errors import SegmillError


@dataclass(frozen=True)
class Task:
    """One stretch of the test stream. `index` counts from 1, in the order of adaptation."""

    index: int
    corruption: str
    severity: int

    @property
    def name(self) -> str:
        """What files and metrics are called by: `03_motion_blur_5`."""
        return f"{self.index:02d}_{self.corruption}_{self.severity}"


def tasks_of(corruptions: Sequence[str], severities: Sequence[int]) -> list[Task]:
    """Every corruption at every severity, the severities of a corruption side by side."""
    for key, values in (("corruptions", corruptions), ("severities", severities)):
        if not values:
            raise SegmillError(f"data.{key} is empty, so there is no task. Give one at least.")
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise SegmillError(f"data.{key} has {value} {count} times; every task is run once.")
    pairs = [(corruption, severity) for corruption in corruptions for severity in severities]
    return [Task(index, *pair) for index, pair in enumerate(pairs, start=1)]
