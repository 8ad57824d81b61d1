import pytest
import split_work
import torch

from segmill.models.class_split import ClassSplit
from tiny_adapt import tiny_model
from tiny_processes import run_processes

# Float32 sums in another order.
CLOSE = {"atol": 1e-6, "rtol": 0.0}
CASES = [f"{method}, {name}" for method in split_work.METHODS for name in split_work.SETTINGS]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_processes(split_work.everything, tmp_path_factory.mktemp("two"), count=2)


@pytest.fixture(scope="module")
def alone():
    return split_work.everything()


def test_the_windows_of_these_tests_have_unequal_class_counts():
    model, generator = tiny_model(), torch.Generator()
    noisy = model.noisy_windows(split_work.VIEWS.original, generator)
    windows = model.weighted_windows(model(split_work.VIEWS.image), noisy, generator)
    assert len(set(windows.widths)) > 2
    assert {width % 2 for width in windows.widths} == {0, 1}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_gradients_of_one(two, alone, case):
    expected_loss, expected_steps, _ = alone[case]
    for loss, steps, _ in (each[case] for each in two):
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        for step, expected in zip(steps, expected_steps, strict=True):
            assert set(step) == set(expected)
            for name, gradient in step.items():
                torch.testing.assert_close(gradient, expected[name], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_processes_ask_the_guide_alike_and_share_the_classes(two, alone, case):
    calls = two[0][case][2]
    assert two[1][case][2] == calls
    shared, whole = (
        sum(count * each for count, each in asked) for asked in (calls, alone[case][2])
    )
    assert shared < whole


def test_processes_draw_the_same_times_noise_and_class_sets(two, alone):
    for process in (two[1], alone):
        t, noise, classes, mask = process["drawn"]
        assert torch.equal(t, two[0]["drawn"][0])
        assert torch.equal(noise, two[0]["drawn"][1])
        assert torch.equal(classes[:, :3], two[0]["drawn"][2][:, :3])
        assert torch.equal(mask, two[0]["drawn"][3])
    assert not mask.all()


def test_the_first_process_decides_where_processes_see_different_logits(two):
    first, second = (each["at odds"] for each in two)
    for own, other in zip(first, second, strict=True):
        assert torch.equal(torch.as_tensor(own), torch.as_tensor(other))


def test_without_a_process_group_all_classes_are_ones_own():
    split = ClassSplit.of_processes()
    values = torch.rand(2, 5, 3)
    assert (split.rank, split.size) == (0, 1)
    assert torch.equal(split.share(values), values)
    assert split.total(values) is values


def test_shares_of_equal_size_cover_all_classes():
    values = torch.arange(12).view(2, 6)
    shares = [ClassSplit(rank, 3).share(values) for rank in range(3)]
    assert [each.tolist() for each in shares[0]] == [[0, 3], [6, 9]]
    assert torch.equal(torch.cat(shares, dim=1).sort(dim=1).values, values)
