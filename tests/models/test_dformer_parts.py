"""The parts of DFormer, DFormerv2 and their head, against the official code's values."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from golden import FOLDER, dformer_bases, dformer_normal, dformer_state
from segmill.checkpoint.load import load_arrays, shapes_of
from segmill.models.backbones import dformer, dformerv2
from segmill.models.backbones.dformerv2 import Geometry, RowColumnAttention, WholeAttention
from segmill.models.families.dformer import LightHamHead
from segmill.models.hamburger import NMF
from segmill.ops.cell_means import cell_means
from segmill.ops.geometry_attention import geometry_bias

UNITS = np.load(FOLDER / "dformer" / "units.npz")
# float32, the same operations in another order, on values of about 1.
ATOL = 1e-5
HEIGHT, WIDTH = 6, 10


def official(module: nn.Module, prefix: str) -> Any:
    """The module with the weights of the golden run, which follow from the names."""
    state = dformer_state(shapes_of(module), prefix)
    load_arrays(module, state, may_miss=[r"(.+\.)?(angle|decay)"])
    return module.eval()


@pytest.fixture
def prior() -> Any:
    return official(dformerv2.GeometryPrior(heads=4, head_range=4.0, key_width=16), "unit.geo.")


@pytest.fixture
def geometry() -> Geometry:
    block = dformerv2.Block(
        attention=WholeAttention,
        width=64,
        heads=4,
        head_range=4.0,
        hidden=64,
        layer_scale=None,
        rate=0.0,
    )
    depth = torch.from_numpy(dformer_normal("unit_depth", 2, 1, 12, 20))
    return dformerv2.Stage([block], next_width=None).geometry(depth, HEIGHT, WIDTH)


def close(ours: Tensor, name: str, *, atol: float = ATOL) -> None:
    np.testing.assert_allclose(ours.detach(), UNITS[name], atol=atol, rtol=0)


def test_frequencies_and_decays_are_the_official_ones(prior):
    close(prior.angle, "geo_angle")
    close(prior.decay, "geo_decay")
    close(prior.weight, "geo_weight")


def test_tokens_turn_by_their_number_along_the_raster(geometry):
    close(geometry.cosine.repeat_interleave(2, dim=-1), "geo_cos")
    close(geometry.sine.repeat_interleave(2, dim=-1), "geo_sin")


@torch.no_grad()
def test_rows_columns_and_the_whole_map_have_the_official_bias(prior, geometry):
    weight, depth = prior.weight.flatten(), geometry.depth
    rows, columns = torch.arange(float(HEIGHT)), torch.arange(float(WIDTH))
    in_rows = geometry_bias(columns, depth.flatten(0, 1), weight, prior.decay)
    close(in_rows.unflatten(0, (2, HEIGHT)).transpose(1, 2), "geo_mask_w")
    in_columns = geometry_bias(rows, depth.mT.flatten(0, 1), weight, prior.decay)
    close(in_columns.unflatten(0, (2, WIDTH)).transpose(1, 2), "geo_mask_h")
    position = torch.cartesian_prod(rows, columns)
    close(geometry_bias(position, depth.flatten(1), weight, prior.decay), "geo_mask_full")


@pytest.mark.parametrize(
    ("kind", "prefix", "name"),
    [
        (WholeAttention, "unit.fgsa.", "gsa_full"),
        (RowColumnAttention, "unit.dgsa.", "gsa_decomposed"),
    ],
)
@torch.no_grad()
def test_both_forms_of_geometry_attention_are_the_official_ones(
    kind, prefix, name, prior, geometry
):
    attention = official(kind(width=64, heads=4), prefix)
    tokens = torch.from_numpy(dformer_normal("unit_x", 2, HEIGHT, WIDTH, 64))
    close(attention(tokens, geometry, prior), name)


@torch.no_grad()
def test_a_block_of_two_streams_is_the_official_one():
    block = dformer.Block(width=64, heads=2, mlp_ratio=4, pooled=True, ends_depth=False, rate=0.1)
    colour = torch.from_numpy(dformer_normal("unit_bx", 2, 9, 11, 64))
    depth = torch.from_numpy(dformer_normal("unit_be", 2, 9, 11, 32))
    colour, depth = official(block, "unit.blk.")(colour, depth)
    close(colour, "blk_out")
    close(depth, "blk_out_e")


@pytest.mark.parametrize(("training", "name"), [(True, "nmf_out_train"), (False, "nmf_out_eval")])
def test_the_factorisation_is_the_official_one(training, name, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.from_numpy(dformer_bases(*size)))
    feature = torch.from_numpy(dformer_normal("unit_nmf", 2, 512, 6, 8)).relu()
    nmf = NMF(rank=64, train_steps=6, eval_steps=7).train(training)
    close(nmf(feature), name, atol=1e-4)  # each update divides by what the one before rounded


@pytest.mark.parametrize(
    "size", sorted(name.rpartition("_")[2] for name in UNITS if name.startswith("pool7_in"))
)
def test_cells_of_the_pooled_attention_are_the_official_ones(size):
    tokens = torch.from_numpy(UNITS[f"pool7_in_{size}"]).permute(0, 2, 3, 1)
    close(cell_means(tokens, 7).unflatten(1, (7, 7)).permute(0, 3, 1, 2), f"pool7_out_{size}")


def test_the_last_block_leaves_the_depth_alone():
    block = dformer.Block(width=8, heads=2, mlp_ratio=2, pooled=True, ends_depth=True, rate=0.0)
    depth = torch.randn(1, 5, 4, 4)
    assert torch.equal(block(torch.randn(1, 5, 4, 8), depth)[1], depth)
    assert not any("_e." in name and "proj" in name for name, _ in block.named_parameters())


def test_trunks_start_as_the_official_ones():
    one = dformer.Block(width=8, heads=2, mlp_ratio=2, pooled=True, ends_depth=False, rate=0.0)
    assert {one.layer_scale_1.max().item(), one.layer_scale_2_e.min().item()} == {
        torch.tensor(1e-6).item()
    }
    trunk = dformerv2.DFormerV2(
        widths=[64, 64],
        depths=[1, 1],
        heads=[2, 2],
        head_ranges=[4.0, 4.0],
        mlp_ratios=[4.0, 4.0],
        layer_scale=[None, 1e-6],
        drop_path_rate=0.0,
    )
    for module in trunk.modules():
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    first, second = (trunk.get_submodule(f"layers.{stage}.blocks.0") for stage in (0, 1))
    assert first.gamma_1 is None
    assert torch.equal(second.get_parameter("gamma_2"), torch.full((1, 1, 1, 64), 1e-6))


def test_the_head_starts_as_the_official_one():
    head = LightHamHead(
        in_channels=[8, 256],
        in_index=[1],
        ham_channels=128,
        channels=256,
        rank=4,
        train_steps=1,
        eval_steps=1,
        dropout=0.1,
        num_classes=40,
    )
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / module.in_channels) ** 0.5  # He's rule for what comes in
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
