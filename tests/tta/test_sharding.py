"""Compiled blocks, shared-out weights, and the copy that they are put back from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sharding_work
from segmill.configuration import build, compose
from segmill.data.tasks import Task
from segmill.models.families.image_classifier import ImageClassifier
from segmill.optim import AdamW
from segmill.tta.dusa import Dusa
from segmill.tta.sharding import Snapshot, compile_blocks, local, repeated_blocks, world_size
from segmill.tta.source import Source
from tiny_adapt import tiny_model
from tiny_processes import run_processes
from tiny_trainer import fit, module_of

# One process starts the others once for all of these tests.
pytestmark = pytest.mark.xdist_group("sharding")

SETTINGS = AdamW(
    learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999), rules={}, norm_decay_mult=None
)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return sharding_work.results()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(sharding_work.results, tmp_path_factory.mktemp("two"), count=2)


@pytest.mark.parametrize("keep", [False, True])
def test_shared_out_weights_give_the_same_numbers_as_whole_ones(
    one: dict[str, Any], two: list[dict[str, Any]], keep: bool
) -> None:
    expected = one[f"gathered {keep}"]
    for process in two:
        found = process[f"gathered {keep}"]
        for key in ("output", "stepped", "restored"):
            # The mean of two equal gradients is exact, so are the weights after it.
            torch.testing.assert_close(found[key], expected[key], atol=0, rtol=0, msg=key)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("keep", [False, True])
def test_a_snapshot_gives_back_every_bit(
    one: dict[str, Any], two: list[dict[str, Any]], keep: bool
) -> None:
    for process in (one, *two):
        found = process[f"gathered {keep}"]
        assert found["bits"]
        assert torch.equal(found["restored"], found["output"])
        assert not torch.equal(found["stepped"], found["output"])


def test_each_process_has_a_part_of_the_weights(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert [process["processes"] for process in two] == [2, 2]
    parts = [process["gathered True"]["numbers"] for process in two]
    assert sum(parts) == one["gathered True"]["numbers"]
    assert max(parts) < 0.7 * sum(parts)


def test_weights_are_gathered_in_bfloat16_and_gradients_summed_in_float32(
    two: list[dict[str, Any]],
) -> None:
    for process in two:
        found = process["bfloat16"]
        assert set(found["gathered"]) == {torch.bfloat16}
        assert set(found["gradients"]) == set(found["weights"]) == {torch.float32}
        assert found["buffer"] == torch.float32


def test_one_process_is_no_group() -> None:
    assert world_size() == 1
    tensor = torch.ones(2)
    assert local(tensor) is tensor


def test_a_snapshot_is_put_back_in_place_and_knows_of_no_later_change() -> None:
    values = {"weight": nn.Parameter(torch.rand(3)), "count": torch.tensor(7)}
    before = {name: each.detach().clone() for name, each in values.items()}
    places = [each.data_ptr() for each in values.values()]
    snapshot = Snapshot(values)
    for _ in range(2):
        with torch.no_grad():
            for each in values.values():
                each.add_(1)
        snapshot.restore()
        assert all(torch.equal(each.detach(), before[name]) for name, each in values.items())
    assert [each.data_ptr() for each in values.values()] == places


@pytest.mark.parametrize(
    ("model", "count"),
    # Transformers have theirs in lists; BatchNorm's statistics may be exchanged, so no ResNet's.
    [
        ("segformer_mit-b0", 8),
        ("deeplabv3plus_r50-d8", 0),
    ],
)
def test_the_repeated_blocks_of_a_network_are_found(model: str, count: int) -> None:
    config = compose("train", [f"model={model}", "data=scenes", "data.channels=3"])
    with torch.device("meta"):
        blocks = repeated_blocks(build(config.model).network)
    assert len(blocks) == count
    assert not any(isinstance(each, nn.BatchNorm2d) for block in blocks for each in block.modules())


@pytest.mark.parametrize(
    ("name", "count"),
    [("convnext_large.fb_in1k", 36), ("vit_base_patch16_224.augreg_in1k", 12), ("resnet18", 0)],
)
def test_the_blocks_of_timms_classifiers_are_found_in_their_sequences(
    name: str, count: int
) -> None:
    with torch.device("meta"):
        network = ImageClassifier(model_name=name, num_classes=10, options={})
    assert len(repeated_blocks(network)) == count


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Modules whose forward was handed to torch.compile, which leaves them as they are here."""
    found: list[nn.Module] = []

    def keep(forward: Any, **settings: Any) -> Any:
        assert settings == {"dynamic": False}
        found.append(forward.__self__)
        return lambda *values: forward(*values)

    monkeypatch.setattr(torch, "compile", keep)
    return found


def test_compiling_leaves_hooks_and_names_alone(compiled: list[nn.Module]) -> None:
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    names = [set(block.state_dict()) for block in blocks]
    calls: list[int] = []
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(0))
    compile_blocks(blocks)
    blocks[0](torch.ones(2))
    assert calls == [0]
    assert compiled == blocks
    assert [set(block.state_dict()) for block in blocks] == names


def test_blocks_are_compiled_once_however_many_tasks_and_methods(
    tmp_path: Path, compiled: list[nn.Module]
) -> None:
    losses = {}
    for switch in (False, True):
        model = tiny_model()
        module = module_of(model, compiled=switch)
        for method in (Dusa(model=model, step="image"), Source(model=model)):
            settings = SETTINGS if isinstance(method, Dusa) else None
            module.begin(method, settings, batch_statistics=False)
            for task in (Task(1, "fog", 5), Task(2, "snow", 5)):
                fit(module, tmp_path, task)
                losses[switch, type(method).__name__, task.index] = module.record.course.mean_loss()
        if switch:
            assert compiled == model.guide.blocks()
    assert all(losses[True, *rest] == loss for (_, *rest), loss in losses.items())
