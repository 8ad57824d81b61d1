"""Guides sharded over two processes compute what one process does."""

import pytest
import sharded_guides_work as work
import torch

from tiny_processes import run_processes

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("sharded_guides")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_processes(work.predictions_and_gradients, folder, count=2)


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two: more of them sum in another order
    yield work.predictions_and_gradients()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", work.GUIDES)
def test_two_processes_hold_half_the_weights_each(two, alone, name):
    own = [each[f"{name}, float32"]["numbers"] for each in two]
    every = alone[f"{name}, float32"]["numbers"]
    assert sum(own) == every
    assert max(own) < 0.55 * every


@pytest.mark.parametrize("name", work.GUIDES)
def test_sharded_guides_predict_as_one_does(two, alone, name):
    expected = alone[f"{name}, float32"]
    for process in two:
        ours = process[f"{name}, float32"]
        # The same operations on the same numbers.
        torch.testing.assert_close(ours["prediction"], expected["prediction"], atol=1e-6, rtol=1e-6)
        for key, gradient in expected["gradients"].items():
            if gradient is not None:
                # The mean of two equal gradients.
                scale = gradient.abs().max().item()
                torch.testing.assert_close(
                    ours["gradients"][key], gradient, atol=1e-5 * scale + 1e-7, rtol=0, msg=key
                )


@pytest.mark.parametrize("name", work.GUIDES)
def test_in_bfloat16_sharding_changes_no_more_than_rounding(two, alone, name):
    exact = alone[f"{name}, float32"]["prediction"]
    scale = exact.pow(2).mean().sqrt()
    for results in (*two, alone):
        prediction = results[f"{name}, bfloat16"]["prediction"]
        assert prediction.dtype == torch.float32
        # A few layers of rounding to 8 bits.
        assert (prediction - exact).pow(2).mean().sqrt() < 0.04 * scale


def test_blocks_compile_without_a_graph_break(two):
    assert two[0]["compiled"] < 1e-5  # of values around one; the same operations
