"""Weights into a network: strict, whoever wrote them; and the files that segmill writes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint import choose
from segmill.checkpoint.keys import Prefix, Rename, Rule
from segmill.checkpoint.load import choose_rules, load_arrays, load_weights, save_safetensors
from segmill.checkpoint.read import CheckpointError, read_checkpoint, read_metadata


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.decode_head = nn.Conv2d(4, 5, 1)

    def key_rules(self) -> dict[str, tuple[Rule, ...]]:
        return {
            "mmseg": (
                Rename(r"backbone\.stem\.(.+)", r"backbone.0.\1"),
                Rename(r"backbone\.bn\.(.+)", r"backbone.1.\1"),
            )
        }


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    return {name: value.numpy() for name, value in Net().state_dict().items()}


def in_mmseg_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {"backbone.0.": "backbone.stem.", "backbone.1.": "backbone.bn."}
    return {
        next(
            (new + name[len(old) :] for old, new in names.items() if name.startswith(old)), name
        ): a
        for name, a in arrays.items()
    }


def same(net: nn.Module, arrays: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(v.numpy(), arrays[n]) for n, v in net.state_dict().items())


def test_everything_is_copied(arrays: dict[str, np.ndarray]) -> None:
    net = Net()
    report = load_arrays(net, arrays)
    assert report.problems == 0
    assert same(net, arrays)
    assert next(net.parameters()).requires_grad


def test_nothing_is_copied_when_something_does_not_fit(arrays: dict[str, np.ndarray]) -> None:
    net, before = Net(), Net().state_dict()
    net.load_state_dict(before)
    del arrays["decode_head.bias"]
    with pytest.raises(CheckpointError, match="1 missing"):
        load_arrays(net, arrays)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_named_exceptions_keep_the_networks_own_values(arrays: dict[str, np.ndarray]) -> None:
    net = Net()
    head = net.decode_head.weight.detach().clone()
    arrays["decode_head.weight"] = np.zeros((150, 4, 1, 1), np.float32)
    del arrays["decode_head.bias"]
    exception = [r"decode_head\..*"]
    report = load_arrays(net, arrays, may_miss=exception, may_leave=exception)
    assert report.excused == ("decode_head.bias",)
    assert [name for name, *_ in report.wrong_shape] == ["decode_head.weight"]
    assert torch.equal(net.decode_head.weight, head)


def test_half_precision_and_read_only_arrays_are_taken(arrays: dict[str, np.ndarray]) -> None:
    net = Net()
    half = {name: array.astype(np.float16)[...] for name, array in arrays.items()}
    half["backbone.1.num_batches_tracked"] = np.array(7)
    for array in half.values():
        array.flags.writeable = False
    load_arrays(net, half)
    assert net.decode_head.weight.dtype == torch.float32
    assert net.state_dict()["backbone.1.num_batches_tracked"] == 7


def test_the_rules_that_fit_are_found(arrays: dict[str, np.ndarray]) -> None:
    assert choose_rules(Net(), arrays) == ("segmill", ())
    origin, rules = choose_rules(Net(), in_mmseg_names(arrays))
    assert origin == "mmseg"
    net = Net()
    load_arrays(net, in_mmseg_names(arrays), rules=rules)
    assert same(net, arrays)


@pytest.mark.parametrize("prefix", ["module.", "model.network.", "_orig_mod.", "student.m.x."])
def test_a_shared_prefix_is_removed(prefix: str, arrays: dict[str, np.ndarray]) -> None:
    wrapped = {prefix + name: array for name, array in in_mmseg_names(arrays).items()}
    origin, rules = choose_rules(Net(), wrapped | {"criterion.w": np.ones(1)})
    assert (origin, rules[0]) == ("mmseg", Prefix(prefix, ""))
    net = Net()
    load_arrays(net, wrapped, rules=rules)
    assert same(net, arrays)


def test_a_file_of_the_backbone_alone_is_placed(arrays: dict[str, np.ndarray]) -> None:
    names = in_mmseg_names(arrays)
    alone = {
        name.removeprefix("backbone."): array
        for name, array in names.items()
        if name.startswith("backbone.")
    }
    origin, rules = choose_rules(Net(), alone)
    assert (origin, rules[0]) == ("mmseg", Prefix("", "backbone."))
    load_arrays(Net(), alone, rules=rules, may_miss=[r"decode_head\..*"])


def test_weights_come_from_a_file_or_a_run(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    (tmp_path / "run").mkdir()
    save_safetensors(tmp_path / "run" / "model.safetensors", state, {})
    for source in (tmp_path / "w.pth", str(tmp_path / "run"), tmp_path / "run/model.safetensors"):
        net = Net()
        load_weights(net, source)
        assert same(net, arrays)


def test_a_run_without_weights_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors.*last\.ckpt"):
        load_weights(Net(), tmp_path)


def test_an_absent_file_is_no_hub_id(tmp_path: Path) -> None:
    for source in ("weights/none.pth", tmp_path / "none.pth", "none"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_weights(Net(), source)


def test_written_weights_read_back_with_their_metadata(
    arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    tied = torch.ones(2, 2)
    save_safetensors(path, {"a": tied, "b": tied.T, "c": tied.bfloat16()}, {"segmill": "{}"})
    written = read_checkpoint(path)
    assert {name: array.shape for name, array in written.items()} == dict.fromkeys("abc", (2, 2))
    assert read_metadata(path) == {"segmill": "{}"}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": torch.ones(1)}, {})
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_safetensors(path, {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_layout_of_memory_does_not_matter(tmp_path: Path) -> None:
    net = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_safetensors(tmp_path / "m.safetensors", net.state_dict(), {})
    other = Net()
    load_weights(other, tmp_path / "m.safetensors")
    assert torch.equal(other.backbone[0].weight, net.backbone[0].weight)
    assert choose.RUN_WEIGHTS == "model.safetensors"
