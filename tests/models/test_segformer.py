"""Our SegFormer, the one of transformers, and their tie. MMSegmentation's is in test_parity.py."""

import gate
import numpy as np
import pytest
import torch
from torch import nn

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import choose_rules, load_arrays
from segmill.checkpoint.read import read_checkpoint
from segmill.models.families.segformer import ConvHead

SMALL = {
    "channels": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
    "num_heads": [1, 2, 3, 4],
    "reductions": [8, 4, 2, 1],
}
# Millions of parameters in the table 1 of the paper (linear head; 3.8 is 3.75).
MILLIONS = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}


def _sizes(where: str) -> list[str]:
    return [f"model.network.{where}{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """transformers' class, small, with statistics and biases that are not the initial ones."""
    torch.manual_seed(0)
    network = gate.build(
        "segformer_mit-b5_hf", *_sizes(""), "model.network.head_channels=20", num_classes=7
    )
    for name, value in network.state_dict().items():
        if value.ndim == 1:
            value.add_(torch.rand_like(value) * (0.5 if "var" in name else 0.2))
    return network.eval()


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    """The weights as transformers saves them, which is how they lie on the hub."""
    folder = tmp_path_factory.mktemp("hub")
    theirs.model.save_pretrained(folder)
    return read_checkpoint(folder / "model.safetensors")


@pytest.fixture(scope="module")
def ours(file) -> nn.Module:
    network = gate.build(
        "segformer_mit-b5_linear",
        *_sizes("backbone."),
        "model.network.decode_head.channels=20",
        num_classes=7,
    )
    load_arrays(network, file, rules=network.key_rules()["hf"])
    return network.eval()


def test_files_of_transformers_give_equal_logits(theirs, ours):
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        # float32; ours folds two linear maps into one and upsamples after them, not before.
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=3e-6)


def test_gradients_equal_those_of_transformers(theirs, ours):
    image, label = torch.randn(2, 3, 64, 64), torch.randint(0, 7, (2, 64, 64))
    for network in (theirs, ours):
        network.zero_grad()
        network.losses(image, label)["decode.loss_ce"].backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.model.named_parameters()}
    # The rules that carry weights over carry gradients over too.
    expected = apply_rules(gradients, ours.key_rules()["hf"])
    for name, parameter in ours.named_parameters():
        # Sums of float32 products in another order, relative to the largest entry.
        error = np.abs(parameter.grad.numpy() - expected[name]).max()
        assert error <= 1e-5 * max(np.abs(expected[name]).max(), 1e-2), name


def test_names_in_a_file_and_in_memory_of_transformers_both_load(theirs, ours, file):
    in_memory = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
    own = {name for name, _ in ours.named_parameters()}
    for arrays in (file, in_memory):
        assert own <= set(apply_rules(arrays, ours.key_rules()["hf"]))


def test_the_wrapper_loads_the_hubs_files(theirs, file):
    network = gate.build(
        "segformer_mit-b5_hf", *_sizes(""), "model.network.head_channels=20", num_classes=7
    )
    origin, rules = choose_rules(network, file)
    assert origin == "hf"
    load_arrays(network.eval(), file, rules=rules)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(image), theirs(image))


def test_the_file_of_transformers_is_recognised_by_our_network(ours, file):
    assert choose_rules(ours, file)[0] == "hf"


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_are_the_published_ones(size):
    with torch.device("meta"):
        network = gate.build(f"segformer_mit-{size}_linear")
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(count, 1) == MILLIONS[size]


def test_the_head_equals_upsample_then_concatenate_then_fuse():
    torch.manual_seed(0)
    head = ConvHead(in_channels=[3, 5], channels=4, dropout=0.1, num_classes=2).eval()
    features = [torch.randn(2, 3, 8, 6), torch.randn(2, 5, 4, 3)]
    maps = [conv(feature) for conv, feature in zip(head.convs, features, strict=True)]
    maps[1] = nn.functional.interpolate(maps[1], (8, 6), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = head.conv_seg(head.fusion_conv(torch.cat(maps, 1)))
        torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-6)


def test_drop_path_rates_rise_linearly_to_the_configured_one():
    with torch.device("meta"):
        network = gate.build("segformer_mit-b2")
    rates = [block.drop_path.rate for stage in network.backbone.layers for block in stage[1]]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 16), atol=1e-7)


@pytest.mark.parametrize(("size", "millions"), [("b0", 3.75), ("b5", 82.01)])
def test_mmsegmentations_head_is_256_wide_in_every_size(size, millions):
    with torch.device("meta"):
        network = gate.build(f"segformer_mit-{size}")
    assert network.decode_head.conv_seg.in_channels == 256
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert round(count, 2) == millions


def test_mmsegmentations_encoder_file_loads_without_its_prefix():
    network = gate.build("segformer_tiny", num_classes=3)
    encoder = {name: value.numpy() for name, value in network.backbone.state_dict().items()}
    rules = network.key_rules()["mmseg"]
    report = load_arrays(network, encoder, rules=rules, may_miss=[r"decode_head\..+"])
    assert len(report.loaded) == len(encoder)


def _as_the_authors_name_it(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """Their names for a key and array of ours (the converter of MMSegmentation, backwards)."""
    parts = name.split(".")
    if parts[0] == "decode_head":
        if parts[1] == "convs":
            stage, kernel = int(parts[2]) + 1, value[:, :, 0, 0] if value.ndim == 4 else value
            return {f"decode_head.linear_c{stage}.proj.{parts[3]}": kernel}
        if name == "decode_head.fusion_conv.conv.weight":
            value = np.concatenate(np.split(value, 4, axis=1)[::-1], axis=1)
        name = name.replace("fusion_conv", "linear_fuse").replace("conv_seg", "linear_pred")
        return {name: value}
    stage, last = int(parts[2]) + 1, parts[-1]
    if parts[3] == "0":
        part = "proj" if parts[4] == "projection" else "norm"
        return {f"backbone.patch_embed{stage}.{part}.{last}": value}
    if parts[3] == "2":
        return {f"backbone.norm{stage}.{last}": value}
    block = f"backbone.block{stage}.{parts[4]}"
    if last.startswith("in_proj_"):
        kind, third = last.removeprefix("in_proj_"), len(value) // 3
        return {f"{block}.attn.q.{kind}": value[:third], f"{block}.attn.kv.{kind}": value[third:]}
    ffn = {"0": "fc1", "1": "dwconv.dwconv", "4": "fc2"}
    if parts[5] == "ffn":
        value = value[:, :, 0, 0] if value.ndim == 4 and parts[7] != "1" else value
        return {f"{block}.mlp.{ffn[parts[7]]}.{last}": value}
    rest = ".".join(parts[5:]).replace("attn.attn.out_proj", "attn.proj")
    return {f"{block}.{rest}": value}


def test_files_of_the_authors_load(ours):
    state = {name: value.numpy() for name, value in ours.state_dict().items()}
    theirs: dict[str, np.ndarray] = {}
    for name, value in state.items():
        theirs |= _as_the_authors_name_it(name, value)
    origin, rules = choose_rules(ours, theirs)
    assert origin == "nvidia"
    renamed = apply_rules(theirs, rules)
    assert renamed.keys() == state.keys()
    assert all(np.array_equal(renamed[name], value) for name, value in state.items())
