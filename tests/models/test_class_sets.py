import pytest
import torch

from segmill.models.class_sets import class_sets, rounded
from segmill.models.class_split import ClassSplit

ALONE = ClassSplit(0, 1)


def logits_of(first: list[list[int]], num_classes: int, second: int | None = None) -> torch.Tensor:
    """Windows whose pixels have the given first choices, and `second` everywhere as the next."""
    logits = torch.zeros(len(first), num_classes, 1, len(first[0]))
    if second is not None:
        logits[:, second] = 1.0
    return logits.scatter(1, torch.tensor(first)[:, None, None, :], 2.0)


def sets_of(logits: torch.Tensor, seed: int = 0, split: ClassSplit = ALONE, **keys):
    settings = {"topk": 1, "max_classes": 20, "min_classes": 0, "buckets": ()} | keys
    generator = torch.Generator().manual_seed(seed)
    return class_sets(logits, generator=generator, split=split, **settings)


def chosen(sets, window: int = 0) -> list[int]:
    return sets.classes[window][sets.valid[window]].tolist()


def test_the_union_of_first_choices_is_taken_in_order():
    sets = sets_of(logits_of([[3, 1, 3, 8]], 10))
    assert chosen(sets) == [1, 3, 8]
    assert sets.widths == (3,)
    assert sets.mask.all()


def test_windows_have_their_own_sets_padded_to_the_widest():
    sets = sets_of(logits_of([[3, 1, 8], [5, 5, 5]], 10))
    assert chosen(sets, 0) == [1, 3, 8]
    assert chosen(sets, 1) == [5]
    assert sets.classes[1].tolist() == [5, 5, 5]
    assert sets.widths == (3, 1)


@pytest.mark.parametrize("seed", range(5))
def test_at_the_cap_nothing_is_drawn(seed):
    sets = sets_of(logits_of([[6, 2, 4]], 10), seed=seed, max_classes=3)
    assert chosen(sets) == [2, 4, 6]
    assert sets.mask.all()


@pytest.mark.parametrize("seed", range(5))
def test_over_the_cap_first_choices_stay_and_the_rest_is_drawn(seed):
    logits = logits_of([[6, 2, 6, 2]], 10)
    logits[0, [0, 1, 3, 0], 0, [0, 1, 2, 3]] = 1.0  # second choices
    sets = sets_of(logits, seed=seed, topk=2, max_classes=3)
    assert len(chosen(sets)) == 3
    assert {2, 6} < set(chosen(sets)) < {0, 1, 2, 3, 6}
    assert sets.mask.all()


@pytest.mark.parametrize("seed", range(5))
def test_first_choices_over_the_cap_are_drawn_and_their_pixels_masked(seed):
    first = [0, 1, 2, 3, 4, 5]
    sets = sets_of(logits_of([first], 10), seed=seed, max_classes=4)
    assert len(chosen(sets)) == 4
    assert sets.mask[0, 0].tolist() == [each in chosen(sets) for each in first]


def test_the_draw_is_fair_and_follows_the_generator():
    logits = logits_of([list(range(6))], 6)
    drawn = [chosen(sets_of(logits, seed=seed, max_classes=3)) for seed in range(200)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=6)
    assert counts.min() > 60  # 100 expected, deviation 7
    assert drawn[0] == chosen(sets_of(logits, seed=0, max_classes=3))


@pytest.mark.parametrize("seed", range(3))
def test_small_sets_are_filled_up_by_drawing(seed):
    sets = sets_of(logits_of([[4, 7, 4]], 10), seed=seed, min_classes=5)
    assert len(chosen(sets)) == 5
    assert {4, 7} < set(chosen(sets))
    assert sets_of(logits_of([[0, 1]], 3), min_classes=5).widths == (3,)  # there are no more


def test_the_generator_advances_alike_whether_or_not_a_draw_decides():
    states = []
    for cap in (2, 20):
        generator = torch.Generator().manual_seed(0)
        class_sets(
            logits_of([[1, 2, 3]], 10),
            topk=1,
            max_classes=cap,
            min_classes=0,
            buckets=(),
            generator=generator,
            split=ALONE,
        )
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("count", "width"),
    [(1, 4), (4, 4), (5, 8), (8, 8), (9, 10), (10, 10)],
)
def test_counts_are_rounded_up_to_a_bucket_but_not_beyond_what_there_is(count, width):
    assert rounded(count, buckets=(4, 8, 12), limit=10, multiple=1) == width


def test_counts_are_multiples_of_the_processes_whatever_the_buckets():
    assert rounded(5, buckets=(4, 8), limit=20, multiple=3) == 9
    assert rounded(13, buckets=(4, 8), limit=20, multiple=2) == 14
    assert rounded(11, buckets=(4, 8, 12), limit=11, multiple=2) == 12


def test_padding_goes_beyond_the_cap_where_processes_need_it():
    sets = sets_of(logits_of([[0, 1, 2]], 3), buckets=(8,))
    assert sets.widths == (3,)
    assert rounded(3, buckets=(8,), limit=3, multiple=4) == 4
