import pytest
import torch

from segmill.models.class_sets import class_sets, rounded
from segmill.models.class_split import ClassSplit
from tiny_adapt import tiny_loss

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


def pixel(prob: list[float], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` images of a classifier: what is ranked, and what is drawn by, not normalised."""
    logits = torch.tensor(prob).log().expand(count, -1)
    return logits[:, :, None, None], logits + 3.0


def test_classes_are_filled_up_as_multinomial_draws_without_replacement():
    prob, count = [0.05, 0.5, 0.1, 0.2, 0.03, 0.12], 40_000
    logits, log_prob = pixel(prob, count)
    sets = sets_of(logits, max_classes=3, min_classes=3, log_prob=log_prob)
    found = torch.zeros(6, 6)
    for pair, share in zip(*sets.classes.unique(dim=0, return_counts=True), strict=True):
        assert 1 in pair, "the top class is always there"
        first, second = [each for each in pair.tolist() if each != 1]
        found[first, second] = share / count
    rest = 1 - prob[1]
    for first in range(6):
        for second in range(first + 1, 6):
            if 1 in (first, second):
                continue
            one, other = prob[first] / rest, prob[second] / rest
            expected = one * other / (1 - one) + other * one / (1 - other)
            # Five standard deviations of a share of so many draws.
            tolerance = 5 * (expected * (1 - expected) / count) ** 0.5
            assert abs(found[first, second] - expected) < tolerance, (first, second)


def test_of_many_pixels_the_mean_probability_decides():
    """A class that one pixel is sure of is drawn half of the time, not never."""
    logits = torch.full((2000, 5, 1, 2), 0.0)
    logits[:, 0] = 50.0  # first choice everywhere
    raw = torch.full((2000, 5, 1, 2), -50.0)
    raw[:, 3, 0, 0] = raw[:, 4, 0, 1] = 50.0
    sets = tiny_loss(topk=1, min_classes=2, classes_threshold=2, fill="softmax").class_sets(
        logits, torch.Generator().manual_seed(0), ALONE, raw
    )
    counts = torch.bincount(sets.classes.flatten(), minlength=5).tolist()
    assert counts[:3] == [2000, 0, 0]
    assert abs(counts[3] - 1000) < 5 * 500**0.5  # five standard deviations


@pytest.mark.parametrize("seed", range(5))
def test_all_classes_but_the_top_ones_are_the_draw_where_no_other_is_left(seed):
    logits, log_prob = pixel([0.05, 0.5, 0.1, 0.2, 0.03, 0.12], 3)
    keys = {"topk": 4, "max_classes": 6, "min_classes": 6, "log_prob": log_prob}
    assert sets_of(logits, seed=seed, **keys).classes.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_improbable_classes_neither_break_the_draw_nor_come_before_probable_ones():
    log_prob = torch.tensor([[0.0, -5000.0, -1.0, -torch.inf]]).expand(200, -1)
    sets = sets_of(
        log_prob.clamp(min=-1e4)[:, :, None, None], max_classes=2, min_classes=2, log_prob=log_prob
    )
    assert sets.classes.tolist() == [[0, 2]] * 200


def test_each_images_draw_is_its_own_generators():
    logits, log_prob = pixel([0.05, 0.5, 0.1, 0.2, 0.03, 0.12], 3)
    keys = {"max_classes": 3, "min_classes": 3, "log_prob": log_prob}

    def of(*seeds: int) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"topk": 1, "buckets": (), "split": ALONE} | keys
        settings["log_prob"] = log_prob[: len(seeds)]
        return class_sets(logits[: len(seeds)], generator=generators, **settings).classes.tolist()

    assert of(1, 2, 3) == of(1) + of(2) + of(3)
    assert len({str(of(seed)) for seed in range(20)}) > 1
