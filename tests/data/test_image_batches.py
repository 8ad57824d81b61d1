"""Batches for several processes: every image once, equally many steps for all."""

from hypothesis import given, settings
from hypothesis import strategies as st

from segmill.data.image_batches import ImageBatches


def of_rank(count: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    batches = ImageBatches(count=count, batch_size=batch_size, place=lambda: (rank, world))
    found = list(batches)
    assert len(batches) == len(found)
    return found


def test_one_process_has_full_batches_and_the_rest():
    assert of_rank(5, 2, 0, 1) == [[0, 1], [2, 3], [4]]


def test_processes_take_what_stands_side_by_side():
    assert of_rank(8, 2, 0, 2) == [[0, 1], [4, 5]]
    assert of_rank(8, 2, 1, 2) == [[2, 3], [6, 7]]


def test_too_few_images_for_a_last_step_join_the_step_before():
    assert of_rank(9, 2, 0, 2) == [[0, 1], [4, 5, 6]]
    assert of_rank(9, 2, 1, 2) == [[2, 3], [7, 8]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 9))
def test_every_image_comes_once_and_no_process_waits(world: int, more: int, batch_size: int):
    count = world + more
    parts = [of_rank(count, batch_size, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    for step in zip(*parts, strict=True):
        sizes = [len(batch) for batch in step]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= batch_size + 1
    assert sorted(index for part in parts for batch in part for index in batch) == [*range(count)]
