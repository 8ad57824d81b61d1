from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tiny_folder import tiny_dataset, write_samples

from segmill.data.stream import InMemory, Shard, StepBatches, TrainStream, shuffled
from segmill.data.transforms import TrainTransform


def step_batches(
    rank: int = 0, world: int = 1, *, accumulate: int = 1, start_step: int = 0
) -> StepBatches:
    return StepBatches(
        batch=8, accumulate=accumulate, start_step=start_step, place=lambda: (rank, world)
    )


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_order_is_the_tail_of_the_whole(world: int, accumulate: int):
    for rank in range(world):
        whole = islice(step_batches(rank, world, accumulate=accumulate), 10 * accumulate)
        tail = step_batches(rank, world, accumulate=accumulate, start_step=3)
        assert list(whole)[3 * accumulate :] == list(islice(tail, 7 * accumulate))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_split_of_the_global_batch_sees_the_same_samples(world: int, accumulate: int):
    whole = list(islice(step_batches(), 5))
    ranks = [
        list(islice(step_batches(rank, world, accumulate=accumulate), 5 * accumulate))
        for rank in range(world)
    ]
    for step, expected in enumerate(whole):
        parts = [r[step * accumulate + m] for r in ranks for m in range(accumulate)]
        assert {len(part) for part in parts} == {8 // (world * accumulate)}
        assert sorted(position for part in parts for position in part) == expected


def test_an_epoch_has_every_sample_once_and_the_next_is_shuffled_anew():
    first, second = ([shuffled(p, 10, seed=1) for p in range(e * 10, e * 10 + 10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != [shuffled(p, 10, seed=2) for p in range(10)]


def test_shards_of_evaluation_meet_every_sample_once():
    shards = [Shard(7, lambda rank=rank: (rank, 3)) for rank in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert sorted(index for shard in shards for index in shard) == list(range(7))


@pytest.fixture
def transform() -> TrainTransform:
    return TrainTransform(
        scale=(32, 24),
        ratio=(0.5, 2.0),
        short_edges=None,
        crop=(16, 16),
        cat_max_ratio=0.9,
        flip=0.5,
        photometric=True,
    )


def test_draws_belong_to_the_position(tmp_path: Path, transform: TrainTransform):
    write_samples(tmp_path)
    stream, again = (TrainStream(tiny_dataset(tmp_path), transform, seed=7) for _ in range(2))
    backwards = {position: again[position] for position in reversed(range(6))}
    for position in range(6):
        sample = stream[position]
        assert sample.name == backwards[position].name
        np.testing.assert_array_equal(sample.image, backwards[position].image)
        np.testing.assert_array_equal(sample.jitter, backwards[position].jitter)
    # The same image comes again in the next epoch under other draws.
    names = [stream[position].name for position in range(6)]
    later = 3 + names[3:].index(names[0])
    assert not np.array_equal(stream[0].jitter, stream[later].jitter)


def test_in_memory_gives_the_same_samples(tmp_path: Path):
    write_samples(tmp_path)
    dataset = tiny_dataset(tmp_path)
    memory = InMemory(dataset, threads=2)
    assert len(memory) == 3
    for index in range(3):
        assert memory[index].name == dataset[index].name
        np.testing.assert_array_equal(memory[index].image, dataset[index].image)
    assert memory[0] is memory[0]
