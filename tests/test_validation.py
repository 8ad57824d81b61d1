import pytest

from segmill.errors import SegmillError
from segmill.validation import ValidationSchedule


def schedule(**changes: int) -> ValidationSchedule:
    return ValidationSchedule(**{"epoch_steps": 100, "every": 10, "each_after": 250, **changes})


def test_the_due_epochs_are_those_of_the_official_recipe():
    due = [epoch for epoch in range(501) if schedule().due(100 * epoch)]
    assert due == [1, *range(10, 251, 10), *range(251, 501)]


def test_nothing_is_due_within_an_epoch():
    assert not any(schedule().due(step) for step in range(25_001, 25_100))


@pytest.mark.parametrize("name", ["epoch_steps", "every"])
def test_counts_start_at_one(name: str):
    with pytest.raises(SegmillError, match=rf"trainer\.validation\.{name}=0"):
        schedule(**{name: 0})
