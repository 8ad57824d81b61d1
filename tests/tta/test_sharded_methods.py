import pytest
import torch
from torch.multiprocessing import spawn

import sharded_methods

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("sharded_methods")


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    spawn(sharded_methods.run, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict:
    return sharded_methods.results()


@pytest.mark.parametrize("kind", list(sharded_methods.NETWORKS))
@pytest.mark.parametrize("name", list(sharded_methods.SETTINGS))
def test_two_processes_that_share_the_weights_give_what_one_gives(
    name, kind, processes, one_process
):
    expected = one_process[f"{name}/{kind}"]
    for process in processes:
        for key, found in process[f"{name}/{kind}"].items():
            # The mean of two equal gradients is exact; only the norm of all, by which sar
            # divides, is summed in another order.
            tolerance = 1e-5 if name == "sar" else 0.0
            torch.testing.assert_close(
                found,
                expected[key],
                atol=tolerance,
                rtol=0.0,
                msg=lambda text, k=key: f"{k} {text}",
            )
