import pytest

from segmill.data.tasks import Task, tasks_of
from segmill.errors import SegmillError


def test_a_task_is_named_by_its_place_corruption_and_severity():
    assert Task(3, "motion_blur", 5).name == "03_motion_blur_5"
    assert Task(12, "fog", 1).name == "12_fog_1"


def test_tasks_keep_the_given_order_with_severities_side_by_side():
    names = [task.name for task in tasks_of(["snow", "fog"], [3, 5])]
    assert names == ["01_snow_3", "02_snow_5", "03_fog_3", "04_fog_5"]


@pytest.mark.parametrize(
    ("corruptions", "severities", "message"),
    [
        ([], [5], r"data\.corruptions is empty"),
        (["fog"], [], r"data\.severities is empty"),
        (["fog", "snow", "fog"], [5], r"data\.corruptions has fog 2 times"),
        (["fog"], [5, 5], r"data\.severities has 5 2 times"),
    ],
)
def test_no_task_and_a_task_twice_are_refused(corruptions, severities, message):
    with pytest.raises(SegmillError, match=message):
        tasks_of(corruptions, severities)
