"""Which images make a step, for any number of processes, batches and images."""

import pytest
from torch.utils.data import DataLoader

from segmill.data.image_batches import ImageBatches
from segmill.errors import SegmillError
from segmill.tta.step_plan import StepPlan, step_plan
from tiny_trainer import batches


def plans(count: int, *, batch: int, accumulate: int, processes: int) -> list[StepPlan]:
    sampler = ImageBatches(count=count, batch_size=batch, place=lambda: (0, processes))
    loader = DataLoader(list(range(count)), batch_sampler=sampler)
    keys = {"accumulate": accumulate, "processes": processes}
    return [step_plan(loader, rank=rank, **keys) for rank in range(processes)]


def steps_of(plan: StepPlan) -> list[list[int]]:
    """Indices of the batches of each step."""
    steps: list[list[int]] = [[]]
    for index in range(len(plan.batches)):
        steps[-1].append(index)
        if plan.ends_step(index):
            steps.append([])
    return steps[:-1]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 3, 100])
@pytest.mark.parametrize("count", [3, 8, 23, 24])
def test_every_image_counts_once_and_alike_in_the_mean_of_its_step(count, accumulate, processes):
    found = plans(count, batch=2, accumulate=accumulate, processes=processes)
    assert [len(plan.batches) for plan in found] == [len(found[0].batches)] * processes
    everything = [position for plan in found for position in plan.positions_of(plan.rank)]
    assert sorted(everything) == list(range(count))
    for step in steps_of(found[0]):
        images = sum(len(plan.own(index)) for plan in found for index in step)
        for plan in found:
            for index in step:
                # Mean over the processes of factor x mean over own images: 1 / images for each.
                share = plan.factor(index) / len(plan.own(index)) / processes
                assert share == pytest.approx(1 / images)


def test_the_last_step_of_a_task_has_what_is_left():
    (plan,) = plans(23, batch=2, accumulate=4, processes=1)
    assert [len(step) for step in steps_of(plan)] == [4, 4, 4]
    assert [len(plan.own(index)) for index in (0, 11)] == [2, 1]
    (plan,) = plans(10, batch=2, accumulate=4, processes=1)
    assert [len(step) for step in steps_of(plan)] == [4, 1]


def test_a_loader_of_single_images_has_one_a_batch():
    plan = step_plan(batches(5), accumulate=2, rank=0, processes=1)
    assert plan.batches == tuple(range(index, index + 1) for index in range(5))
    assert [plan.factor(index) for index in range(5)] == [0.5, 0.5, 0.5, 0.5, 1.0]


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(SegmillError, match=r"1 image\(s\) for 2 processes .*Raise limit"):
        plans(1, batch=4, accumulate=1, processes=2)


def test_data_that_give_every_process_the_same_images_cannot_share_them():
    with pytest.raises(SegmillError, match=r"trainer\.share=classes"):
        step_plan(batches(5), accumulate=1, rank=0, processes=2)
