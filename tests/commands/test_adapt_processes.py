"""Two processes that share both models and split the classes give the numbers of one."""

import json
from pathlib import Path

import numpy as np
import pytest

from tiny_adaptation import adapt_tiny, results_of, start_adapt, write_shapes

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("adapt_processes")

# Steps for every image and for every window, a frozen guide, chunks, the methods without a guide;
# several rows, so that weights are put back and others are chosen on sharded models too.
ROWS = {
    "dusa": "{tta: dusa}",
    "continual": "{tta: dusa, tta.continual: true, optimizer.learning_rate: 1e-4}",
    "windows": "{tta: dusa, tta.method.step: window, model.loss.windows_at_once: 1}",
    "frozen": "{tta: dusa, model.update.generative: false, model.loss.classes_threshold: 3}",
    "chunks": "{tta: dusa, model.loss.class_chunk: 1, model.update.update_norm_only: true}",
    "dusa_u": "{tta: dusa_u}",
    "tent": "{tta: tent}",
    "cotta": "{tta: cotta, tta.predict: after}",
}
METHODS = f"{{{', '.join(f'{name}: {settings}' for name, settings in ROWS.items())}}}"
# Class counts as they are: unequal from window to window, and odd.
SETTINGS = {
    "data__generate": "null",
    "model__loss__buckets": "[]",
    "model__loss__topk": 2,
    "pictures": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_shapes(folder)
    return folder


def both(folder: Path, **changes: object) -> tuple[Path, Path]:
    """The same on two processes and on one."""
    name = str(changes["experiment__name"])
    two = start_adapt(folder, **SETTINGS, **changes, trainer__devices=2)
    one = adapt_tiny(folder, **SETTINGS, **{**changes, "experiment__name": f"{name}_one"})
    printed = two.communicate(timeout=240)[0]
    assert two.returncode == 0, printed
    assert "2 x CPU" in printed
    return folder / "runs" / name, one


@pytest.fixture(scope="module")
def exact(folder: Path) -> tuple[Path, Path]:
    return both(folder, experiment__name="exact", methods=METHODS)


@pytest.fixture(scope="module")
def mixed_precision(folder: Path) -> tuple[Path, Path]:
    keys = {"experiment__name": "bf16", "trainer__precision": "bf16-mixed"}
    return both(folder, **keys, methods="[tent,dusa]")


@pytest.mark.parametrize("row", ["source", *ROWS])
def test_losses_and_counts_are_those_of_one_process(exact: tuple[Path, Path], row: str) -> None:
    two, one = (results_of(run, row) for run in exact)
    for found, expected in zip(two, one, strict=True):
        assert found.names == expected.names
        np.testing.assert_array_equal(found.counts.confusion, expected.counts.confusion)
        np.testing.assert_array_equal(found.counts.areas, expected.counts.areas)
        # float32, the same sums in another order.
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_the_orders_are_the_same(exact: tuple[Path, Path]) -> None:
    two, one = (json.loads((run / "results.json").read_text()) for run in exact)
    orders = {each["order"] for run in (two, one) for each in run["methods"]}
    assert len(orders) == 1


@pytest.mark.parametrize("row", ["source", "tent", "dusa"])
def test_in_bfloat16_losses_agree_to_a_thousandth(
    mixed_precision: tuple[Path, Path], row: str
) -> None:
    two, one = (results_of(run, row) for run in mixed_precision)
    for found, expected in zip(two, one, strict=True):
        assert found.names == expected.names
        np.testing.assert_array_equal(
            found.counts.confusion.sum(axis=1), expected.counts.confusion.sum(axis=1)
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        # Of nearly equal logits the larger one depends on the last of 8 bits.
        assert (
            np.abs(found.counts.confusion - expected.counts.confusion).sum()
            < 0.02 * found.counts.confusion.sum()
        )


def test_only_the_first_process_speaks_and_writes(exact: tuple[Path, Path]) -> None:
    two, _ = exact
    assert not (two.parent / f"{two.name}-2").exists()
    rows = (two / "dusa" / "metrics.csv").read_text().splitlines()
    assert len(rows) == len(set(rows))
