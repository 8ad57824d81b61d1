"""Every process reads its own shards, and together they are the whole."""

import functools
import json
from pathlib import Path

import pytest
import sharded_work
import torch
from safetensors.torch import save_file
from sharded_work import CPU, Net, on_meta
from torch import nn

from segmill.checkpoint.read import CheckpointError
from segmill.checkpoint.sharded import Draws, SafetensorsFiles, draw, fill
from tiny_processes import run_processes


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One file in float16, and the same weights in two files with an index."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    state = {name: torch.randn_like(each).half() for name, each in Net().state_dict().items()}
    save_file(state, folder / "one.safetensors")
    names = sorted(state)
    parts = {"several-1.safetensors": names[::2], "several-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "several.safetensors.index.json").write_text(json.dumps(index))
    return folder


def loaded(folder: Path, name: str = "one.safetensors") -> nn.Module:
    net = on_meta()
    with SafetensorsFiles({"": folder / name}) as source:
        fill(net, source, CPU)
    return net


def test_two_processes_together_have_the_whole(files, tmp_path):
    work = functools.partial(sharded_work.filled_and_drawn, files)
    expected = loaded(files).state_dict()
    drawn = on_meta()
    fill(drawn, Draws(seed=3), CPU)
    for results in run_processes(work, tmp_path, count=2):
        for name in ("one.safetensors", "several.safetensors.index.json"):
            values, read, own = results[name]
            assert read == own, "nothing but the own shards is read"
            for key, value in values.items():
                assert torch.equal(value, expected[key]), key
        for key, value in results["drawn"][0].items():
            assert torch.equal(value, drawn.state_dict()[key]), key
        assert torch.isfinite(results["loss"])


def test_values_are_those_of_the_file_in_the_modules_type(files):
    net = loaded(files, "several.safetensors.index.json")
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, loaded(files).state_dict()[name])
    assert all(each.requires_grad for each in net.parameters())


def test_two_files_fill_two_parts(files):
    with torch.device("meta"):
        pair = nn.ModuleDict({"left": Net(), "right": Net()})
    file = files / "one.safetensors"
    with SafetensorsFiles({"left.": file, "right.": file}) as source:
        fill(pair, source, CPU)
    state = pair.state_dict()
    assert torch.equal(state["left.table"], state["right.table"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("table"), "1 missing in the file:\n  table"),
        (lambda state: state.update(other=torch.zeros(1)), "1 unused from the file:\n  other"),
        (lambda state: state.update(table=torch.zeros(7)), r"table: file \(7,\), network \(6,\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_allocated(tmp_path, change, message):
    state = {name: torch.zeros_like(each) for name, each in Net().state_dict().items()}
    change(state)
    save_file(state, tmp_path / "bad.safetensors")
    net = on_meta()
    with (
        SafetensorsFiles({"": tmp_path / "bad.safetensors"}) as source,
        pytest.raises(CheckpointError, match=message) as error,
    ):
        fill(net, source, CPU)
    assert "bad.safetensors" in str(error.value)
    assert all(each.is_meta for each in net.parameters())


def test_damaged_and_absent_files_are_named(tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors cannot be read"):
        SafetensorsFiles({"": damaged})
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        SafetensorsFiles({"": tmp_path / "absent.safetensors"})
    index = tmp_path / "index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="lists no files"):
        SafetensorsFiles({"": index})


def test_drawn_values_depend_on_name_and_seed():
    first, second = (on_meta() for _ in range(2))
    fill(first, Draws(seed=0), CPU)
    fill(second, Draws(seed=1), CPU)
    assert not torch.equal(first.last.weight, second.last.weight)
    one, other = draw("one", (4,), CPU), draw("other", (4,), CPU)
    assert not torch.equal(one, other)
    assert torch.equal(one, draw("one", (4,), CPU))
    # Weights of norms are near one, biases near zero.
    assert (first.block[1].weight - 1).abs().max() < 0.1
    assert 0 < first.block[1].bias.abs().max() < 0.1


def test_given_values_are_not_drawn():
    net, table = on_meta(), torch.arange(6.0) * 7
    fill(net, Draws(given={"table": table}), CPU)
    assert torch.equal(net.table, table)
