"""The trunk against values of DiT, SiT and REPA (goldens/sit), and names against their files."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from segmill.checkpoint.keys import apply_rules
from segmill.checkpoint.load import choose_rules, load_arrays, shapes_of
from segmill.configuration import build, compose
from segmill.errors import SegmillError
from segmill.models.generative.transformer import DiffusionTransformer, _unpatched, position_code

FOLDER = Path(__file__).parents[2] / "goldens" / "sit"
GOLDEN = json.loads((FOLDER / "golden.json").read_text())
VALUES = np.load(FOLDER / "golden.npz")
CASES = GOLDEN["cases"]
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def draw(name: str, shape: list[int]) -> np.ndarray:
    """The golden values' rule: a parameter is a function of its name and shape."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if len(shape) > 1:
        normal = normal / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight"):
        normal = 1 + 0.1 * normal
    elif name not in ("x", "w"):
        normal = 0.1 * normal
    return normal.astype(np.float32)


def weights_of(case: str) -> dict[str, np.ndarray]:
    """The case's file: the original's names in its order."""
    return {name: draw(name, shape) for name, shape in CASES[case]["keys"]}


def transformer(case: str, *, patch: int = 2) -> DiffusionTransformer:
    sizes = CASES[case]["kwargs"]
    return DiffusionTransformer(
        in_channels=sizes["in_channels"],
        channels=sizes["hidden_size"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        patch=patch,
        mlp_ratio=sizes["mlp_ratio"],
        num_classes=sizes["num_classes"],
        learn_sigma=sizes.get("learn_sigma", False),
        qk_norm=sizes.get("qk_norm", False),
    )


def loaded(case: str) -> DiffusionTransformer:
    network, arrays = transformer(case), weights_of(case)
    load_arrays(network, arrays, rules=choose_rules(network, arrays)[1])
    return network.eval()


def inputs(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    facts = CASES[case]
    latent = torch.from_numpy(VALUES[facts["input"]].copy())
    return latent, torch.tensor(facts["t"]), torch.tensor(facts["y"])


def value(case: str, what: str) -> torch.Tensor:
    return torch.from_numpy(VALUES[f"{case}/{what}"])


# float32, the same operations in another order; the originals' own float64 forward is 2e-6 away,
# DiT's 1.4e-5 (sines of times near 1000).
TOLERANCE = {"repa_8": 5e-6, "repa_8_qknorm": 5e-6, "sit_8": 5e-6, "sit_8_nosigma": 5e-6}
TOLERANCE |= {"sit_16": 5e-6, "dit_8": 3e-5}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_originals(case):
    with torch.no_grad():
        output = loaded(case)(*inputs(case))
    expected = value(case, "out")[:, :4]  # DiT returns the variance too
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE[case])


@pytest.mark.parametrize("case", ["repa_8", "repa_8_qknorm", "sit_8", "sit_16"])
def test_gradients_are_the_originals(case):
    network = loaded(case)
    latent, t, classes = inputs(case)
    latent.requires_grad_()
    output = network(latent, t, classes)
    seed = int.from_bytes(hashlib.sha256(b"w").digest()[:8], "little")
    weight = np.random.Generator(np.random.PCG64(seed)).standard_normal(output.shape)
    (output * torch.from_numpy(weight.astype(np.float32))).sum().backward()
    # Sums of float32 products in another order; the entries are of order 1. A key's bias has no
    # effect, so its gradient is 0 but for rounding.
    torch.testing.assert_close(latent.grad, value(case, "grad_x"), rtol=0, atol=5e-5)
    norms = CASES[case]["grad_l2"]
    for name, parameter in network.named_parameters():
        assert float(parameter.grad.norm()) == pytest.approx(norms[name], rel=1e-4, abs=1e-5), name


def test_gradients_of_dit_are_the_originals():
    """Of all eight output channels, of which the network itself gives four."""
    network, found = loaded("dit_8"), {}
    network.final_layer.register_forward_hook(lambda _m, _i, out: found.update(patches=out))
    latent, t, classes = inputs("dit_8")
    latent.requires_grad_()
    network(latent, t, classes)
    output = _unpatched(found["patches"], (4, 4), 2, 8)
    seed = int.from_bytes(hashlib.sha256(b"w").digest()[:8], "little")
    weight = np.random.Generator(np.random.PCG64(seed)).standard_normal(output.shape)
    (output * torch.from_numpy(weight.astype(np.float32))).sum().backward()
    # As above; sines of times near 1000 are known to 6e-5, see TOLERANCE.
    torch.testing.assert_close(latent.grad, value("dit_8", "grad_x"), rtol=0, atol=3e-4)
    norms = CASES["dit_8"]["grad_l2"]
    for name, parameter in network.named_parameters():
        assert float(parameter.grad.norm()) == pytest.approx(norms[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", ["repa_8", "repa_8_qknorm", "sit_8", "dit_8"])
def test_the_parts_give_what_the_originals_parts_give(case):
    network, found = loaded(case), {}
    for name, module in {
        "x_emb": network.x_embedder,
        "t_emb": network.t_embedder,
        "y_emb": network.y_embedder,
        "block0": network.blocks[0],
    }.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
    with torch.no_grad():
        network(*inputs(case))
    tokens, branch, gate = found["block0"]
    found["block0"] = tokens + gate * branch
    for name, output in found.items():
        expected = value(case, name)
        # As for the output.
        torch.testing.assert_close(
            output[: len(expected)], expected, rtol=0, atol=TOLERANCE[case], msg=name
        )


@pytest.mark.parametrize(("case", "side"), [("sit_8", 4), ("sit_16", 8)])
def test_positions_are_those_of_the_files(case, side):
    code = position_code((side, side), 128, torch.device("cpu"))
    # One rounding from float64 in both.
    torch.testing.assert_close(code[None], value(case, "pos_embed"), rtol=0, atol=1e-7)


def test_positions_of_a_smaller_grid_are_a_part_of_those_of_a_larger_one():
    device = torch.device("cpu")
    large = position_code((6, 9), 16, device).unflatten(0, (6, 9))
    small = position_code((4, 5), 16, device).unflatten(0, (4, 5))
    assert torch.equal(large[:4, :5], small)


def test_rectangles_are_put_together_as_they_were_taken_apart():
    network = transformer("repa_8").eval()
    torch.nn.init.normal_(network.final_layer.linear.weight)
    latent, t, classes = torch.randn(1, 4, 6, 10), torch.tensor([0.3]), torch.tensor([2])
    outputs = {}
    network.final_layer.register_forward_hook(lambda _m, _i, out: outputs.update(patches=out))
    with torch.no_grad():
        whole = network(latent, t, classes)
    assert whole.shape == latent.shape
    patches = outputs["patches"].reshape(3, 5, 2, 2, 4)
    assert torch.equal(whole[0, :, 2:4, 6:8], patches[1, 3].permute(2, 0, 1))


def test_a_latent_that_has_no_whole_patches_is_refused():
    with pytest.raises(SegmillError, match="multiples of the patch"):
        transformer("repa_8")(torch.zeros(1, 4, 5, 8), torch.zeros(1), torch.zeros(1).long())


@pytest.mark.parametrize("name", GOLDEN["shapes"])
def test_names_shapes_and_counts_are_those_of_the_published_sizes(name):
    facts = GOLDEN["shapes"][name]
    size = name.split("-")[1].split("/")[0]
    channels, depth, heads = SIZES[size]
    sigma = "DiT-" in name or "learn_sigma)" in name
    with torch.device("meta"):
        network = DiffusionTransformer(
            in_channels=4,
            channels=channels,
            depth=depth,
            num_heads=heads,
            patch=2,
            mlp_ratio=4.0,
            num_classes=1000,
            learn_sigma=sigma,
            qk_norm=False,
        )
    published = {key: tuple(shape) for key, shape in facts["keys"]}
    assert len(published) == facts["n_keys"]
    zero = {key: np.broadcast_to(np.float32(0), shape) for key, shape in published.items()}
    kept = apply_rules(zero, network.key_rules()["sit"])
    assert {key: array.shape for key, array in kept.items()} == shapes_of(network)
    assert list(kept) == list(shapes_of(network))
    # Positions are no parameters here, projectors have no place.
    left = sum(math.prod(published[key]) for key in published.keys() - kept.keys())
    assert sum(p.numel() for p in network.parameters()) == facts["n_params"] - left


def test_older_files_of_repa_load_whatever_their_encoder_depth():
    arrays = {}
    for name, array in weights_of("repa_8").items():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= 3:
            parts = ["decoder_blocks", str(int(parts[1]) - 3), *parts[2:]]
        arrays[".".join(parts)] = array
    network = transformer("repa_8")
    origin, rules = choose_rules(network, arrays)
    assert origin == "repa, 3 blocks before the projectors"
    load_arrays(network, arrays, rules=rules)
    with torch.no_grad():
        output = network(*inputs("repa_8"))
    # As for the output of newer files.
    torch.testing.assert_close(output, value("repa_8", "out"), rtol=0, atol=5e-6)


CONFIGURED = {
    "sit-xl2_repa": "REPA SiT-XL/2",
    "sit-xl2": "SiT SiT-XL/2 (learn_sigma)",
    "dit-xl2": "DiT DiT-XL/2 256",
}


def configured(name: str) -> DiffusionTransformer:
    """The network of configs/model/generative/NAME.yaml, without memory."""
    words = ["model=combined_classifier", f"model/generative={name}", "data=imagenet_c"]
    with torch.device("meta"):
        return build(compose("adapt", words).model.generative.network)


@pytest.mark.parametrize("name", CONFIGURED)
def test_the_configured_guides_are_the_published_sizes(name):
    published = dict(GOLDEN["shapes"][CONFIGURED[name]]["keys"])
    kept = {
        key: tuple(shape)
        for key, shape in published.items()
        if key != "pos_embed" and not key.startswith("projectors.")
    }
    assert shapes_of(configured(name)) == kept


def test_repas_own_files_and_its_older_names_load_into_the_configured_guide():
    """EMA weights of a training with z_dims=[768] and encoder_depth 8."""
    network = configured("sit-xl2_repa")
    published = {k: tuple(shape) for k, shape in GOLDEN["shapes"]["REPA SiT-XL/2"]["keys"]}
    projectors = [key for key in published if key.startswith("projectors.")]
    assert published["projectors.0.4.weight"] == (768, 2048)
    assert projectors == [f"projectors.0.{n}.{k}" for n in (0, 2, 4) for k in ("weight", "bias")]
    older = {}
    for key, shape in published.items():
        parts = key.split(".")
        if parts[0] == "blocks" and int(parts[1]) >= 8:
            parts = ["decoder_blocks", str(int(parts[1]) - 8), *parts[2:]]
        older[".".join(parts)] = np.broadcast_to(np.float32(0), shape)
    origin, rules = choose_rules(network, older)
    assert origin == "repa, 8 blocks before the projectors"
    assert {k: v.shape for k, v in apply_rules(older, rules).items()} == shapes_of(network)


def test_a_key_that_is_no_projectors_is_not_dropped_in_silence():
    arrays = weights_of("repa_8") | {"projectors.0.6.weight": np.zeros((2, 2), np.float32)}
    network = transformer("repa_8")
    with pytest.raises(SegmillError, match=r"projectors\.0\.6\.weight"):
        load_arrays(network, arrays, rules=choose_rules(network, arrays)[1])


def test_it_starts_as_zero_whatever_the_input():
    network = transformer("sit_8")
    with torch.no_grad():
        assert not network(*inputs("sit_8")).any()
