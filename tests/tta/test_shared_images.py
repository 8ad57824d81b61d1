"""Steps of several batches, and of several processes' images, against one process with all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shared_images_work
from segmill.errors import SegmillError
from segmill.paths import CONFIGS
from segmill.tta.dusa import Dusa
from segmill.tta.dusa_u import DusaU
from segmill.tta.sharding import average_gradients
from segmill.tta.sharing import check_accumulates, check_shares_images
from tiny_images import adapt_images, tiny_classifier
from tiny_methods import method_of
from tiny_processes import run_processes

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("shared_images")

# Float32 sums in another order, through three steps; gradients are between 1e-3 and 1.
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
SHARED = [f"{s}, {name}" for s in ("ddp", "fsdp") for name in shared_images_work.shared(s)]
ACCUMULATING, FIXED = shared_images_work.ACCUMULATING, shared_images_work.FIXED
YAMLS = sorted(path.stem for path in (CONFIGS / "tta").glob("*.yaml"))


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return shared_images_work.results()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(shared_images_work.of_two, tmp_path_factory.mktemp("two"), count=2)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, **CLOSE)
    torch.testing.assert_close(found["prediction"], expected["prediction"], atol=1e-5, rtol=1e-5)
    assert found["names"] == expected["names"]
    assert np.array_equal(found["rank"], expected["rank"])
    np.testing.assert_allclose(found["confidence"], expected["confidence"], atol=1e-5)  # as above


def test_all_methods_of_these_tests_learn(one: dict[str, Any]) -> None:
    before = dict(tiny_classifier().named_parameters())
    for name in set(one) - FIXED - shared_images_work.ALONE:
        found = one[name]
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
        assert torch.equal(found["prediction"], second[name]["prediction"]), f"{name}'s teacher"


def test_accumulated_batches_make_the_step_of_one_large_batch(one: dict[str, Any]) -> None:
    for name, found in shared_images_work.results(batch=2, accumulate=2).items():
        check(found, one[name])


def test_these_are_all_methods_of_the_configuration() -> None:
    assert sorted(shared_images_work.METHODS) == YAMLS


@pytest.mark.parametrize("name", sorted(set(YAMLS) - ACCUMULATING - FIXED))
def test_methods_that_cannot_wait_for_their_step_are_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    method = shared_images_work.METHODS[name]
    named = type(method(tiny_classifier())).__name__
    with pytest.raises(SegmillError, match=rf"accumulate=2: {named} .*a larger data\.batch_size"):
        adapt_images(method, tmp_path, count=2, batch=1, accumulate=2)


def test_methods_without_steps_have_none_to_wait_for() -> None:
    for name in FIXED:
        check_accumulates(method_of(name, tiny_classifier()), 8, "after")


@pytest.mark.parametrize("name", sorted(ACCUMULATING))
def test_predictions_from_after_a_step_that_comes_later_are_refused(name: str) -> None:
    method = shared_images_work.METHODS[name](tiny_classifier())
    check_accumulates(method, 1, "after")
    with pytest.raises(SegmillError, match=r"predict=after with trainer\.accumulate=2: \w+ updat"):
        check_accumulates(method, 2, "after")


@pytest.mark.parametrize("name", sorted(shared_images_work.ALONE))
def test_sharded_weights_cannot_be_each_processs_own(name: str) -> None:
    method = shared_images_work.METHODS[name](tiny_classifier())
    check_shares_images(method, "ddp")
    with pytest.raises(SegmillError, match=r"strategy=fsdp: \w+ learns .*trainer\.strategy=ddp"):
        check_shares_images(method, "fsdp")


@pytest.mark.parametrize("kind", [Dusa, DusaU])
def test_a_step_a_window_is_not_shared_by_processes_with_other_images(kind: Any) -> None:
    method = kind(model=tiny_classifier(), step="window")
    with pytest.raises(SegmillError, match=rf"share=images: {kind.__name__} .*step=image"):
        check_shares_images(method, "ddp")


@pytest.mark.parametrize("kind", [Dusa, DusaU])
@pytest.mark.parametrize(
    "several",
    [
        {"windows_at_once": 2},
        {"windows_at_once": "processes"},
        {"class_chunk": 2, "min_classes": 0},
    ],
)
def test_passes_that_depend_on_the_images_do_not_go_with_sharded_weights(
    kind: Any, several: dict[str, Any]
) -> None:
    """Processes would exchange the weights of one pass and of another, or wait for ever."""
    method = kind(model=tiny_classifier(**several), step="image")
    check_shares_images(method, "ddp")
    with pytest.raises(SegmillError, match=rf"strategy=fsdp: {kind.__name__} takes .*both to null"):
        check_shares_images(method, "fsdp")


@pytest.mark.parametrize("kind", [Dusa, DusaU])
def test_as_many_classes_for_every_image_are_as_many_passes(kind: Any) -> None:
    check_shares_images(kind(model=tiny_classifier(class_chunk=2), step="image"), "fsdp")


@pytest.mark.parametrize("name", sorted(shared_images_work.ALONE))
def test_what_is_drawn_for_an_image_does_not_depend_on_its_batch(
    one: dict[str, Any], name: str
) -> None:
    check(shared_images_work.found_of(name, batch=1), one[name])


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
