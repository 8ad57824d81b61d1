"""Steps of several batches, and of several processes' images, against one process with all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shared_images_work
from segmill.errors import SegmillError
from segmill.tta.dusa import Dusa
from segmill.tta.sharding import average_gradients
from tiny_images import adapt_images, tiny_classifier
from tiny_methods import method_of
from tiny_processes import run_processes

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("shared_images")

# Float32 sums in another order, through three steps; gradients are between 1e-3 and 1.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
SHARED = [f"{s}, {name}" for s in ("ddp", "fsdp") for name in shared_images_work.METHODS]


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return shared_images_work.results()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(shared_images_work.of_two, tmp_path_factory.mktemp("two"), count=2)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **CLOSE)
    assert found["names"] == expected["names"]
    assert np.array_equal(found["rank"], expected["rank"])
    np.testing.assert_allclose(found["confidence"], expected["confidence"], atol=1e-5)  # as above


def test_all_methods_of_these_tests_learn(one: dict[str, Any]) -> None:
    before = dict(tiny_classifier().named_parameters())
    for name, found in one.items():
        moved = [(found["weights"][key] - each).abs().max() for key, each in before.items()]
        assert max(moved) > 100 * CLOSE["atol"], name


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_with_half_of_the_images_each_do_what_one_does(
    one: dict[str, Any], two: list[dict[str, Any]], case: str
) -> None:
    for process in two:
        check(process[case], one[case.partition(", ")[2]])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_that_accumulate_do_what_one_does(
    one: dict[str, Any], two: list[dict[str, Any]], strategy: str
) -> None:
    for process in two:
        check(process[f"{strategy}, dusa accumulated"], one["dusa"])


def test_every_image_is_counted_once_and_in_the_order_of_the_stream(
    two: list[dict[str, Any]],
) -> None:
    for process in two:
        for name, found in process.items():
            count = len(found["names"])
            assert found["names"] == tuple(f"image {index}" for index in range(count)), name
            assert len(found["rank"]) == len(found["confidence"]) == count


def test_both_processes_have_the_same_weights(two: list[dict[str, Any]]) -> None:
    first, second = two
    for name, found in first.items():
        for key, weight in found["weights"].items():
            assert torch.equal(weight, second[name]["weights"][key]), f"{name}: {key}"


def test_accumulated_batches_make_the_step_of_one_large_batch(one: dict[str, Any]) -> None:
    for name, found in shared_images_work.results(batch=2, accumulate=2).items():
        check(found, one[name])


def test_methods_that_cannot_wait_for_their_step_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SegmillError, match=r"trainer\.accumulate=2: SAR"):
        adapt_images(
            lambda model: method_of("sar", model), tmp_path, count=2, batch=1, accumulate=2
        )


def test_dusa_with_a_step_a_window_cannot_accumulate(tmp_path: Path) -> None:
    with pytest.raises(SegmillError, match=r"trainer\.accumulate=2: Dusa"):
        adapt_images(
            lambda model: Dusa(model=model, step="window"),
            tmp_path,
            count=2,
            batch=1,
            accumulate=2,
        )


def test_nothing_to_average_needs_no_process_group() -> None:
    average_gradients([torch.nn.Parameter(torch.ones(2))])
