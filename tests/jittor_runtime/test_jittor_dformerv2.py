"""DFormerv2 on Jittor, against the official code's golden values."""

import numpy as np
import pytest

jt = pytest.importorskip("jittor")

import jittor_gate as gate

from golden import FOLDER, dformer_normal, dformer_state, dformer_weight
from segmill.jittor import random
from segmill.jittor.load import load_arrays, shapes_of
from segmill.jittor.models.backbones import dformerv2

pytestmark = pytest.mark.jittor
UNITS = np.load(FOLDER / "dformer" / "units.npz")
SMALL_TRUNK = (
    "model.network.backbone.widths=[8,16,32,32]",
    "model.network.backbone.depths=[1,1,2,1]",
    "model.network.backbone.heads=[2,2,4,4]",
)
ATOL = 1e-5  # the masks are as large as 20, the angles 60


def small(*overrides):
    random.seed(0)
    return gate.build("dformerv2-b", *SMALL_TRUNK, *gate.SMALL_HEAD, *overrides, num_classes=5)


def unit_prior():
    prior = dformerv2.GeometryPrior(heads=4, head_range=4.0, key_width=16)
    prior.weight.update(jt.array(dformer_weight("unit.geo.weight", (2, 1, 1, 1))))
    return prior


def unit_geometry(prior):
    return dformerv2.geometry_of(
        jt.array(dformer_normal("unit_depth", 2, 1, 12, 20)), (6, 10), prior.angle
    )


def apart(count):
    return np.abs(np.arange(count)[:, None] - np.arange(count)).astype(np.float32)


def test_angles_and_decays_are_the_official_constants():
    prior = unit_prior()
    np.testing.assert_allclose(prior.angle.numpy(), UNITS["geo_angle"], atol=1e-7)
    np.testing.assert_allclose(prior.decay.numpy(), UNITS["geo_decay"], atol=1e-7)


def test_tokens_turn_by_their_number():
    geometry = unit_geometry(unit_prior())
    np.testing.assert_allclose(geometry.sine.numpy()[:, :, 0], UNITS["geo_sin"], atol=ATOL)
    np.testing.assert_allclose(geometry.cosine.numpy()[:, :, 0], UNITS["geo_cos"], atol=ATOL)


def test_scores_fall_with_the_distance_in_the_map_and_in_depth():
    prior = unit_prior()
    depth = unit_geometry(prior).depth
    rows, columns = np.divmod(np.arange(60), 10)
    whole = apart(6)[rows][:, rows] + apart(10)[columns][:, columns]
    along_rows = prior(depth, apart(10)).numpy()
    along_columns = prior(depth.transpose(0, 2, 1), apart(6)).numpy()
    everywhere = prior(depth.reshape(2, 1, 60), whole).numpy()[:, :, 0]
    np.testing.assert_allclose(along_rows, UNITS["geo_mask_w"], atol=ATOL)
    np.testing.assert_allclose(along_columns, UNITS["geo_mask_h"], atol=ATOL)
    np.testing.assert_allclose(everywhere, UNITS["geo_mask_full"], atol=ATOL)


@pytest.mark.parametrize(
    ("kind", "prefix", "golden"),
    [
        (dformerv2.RowColumnAttention, "unit.dgsa.", "gsa_decomposed"),
        (dformerv2.WholeAttention, "unit.fgsa.", "gsa_full"),
    ],
)
def test_attention_computes_the_official_numbers(kind, prefix, golden):
    attention, prior = kind(width=64, heads=4), unit_prior()
    load_arrays(attention, dformer_state(shapes_of(attention), prefix=prefix), rules=())
    with jt.no_grad():
        tokens = jt.array(dformer_normal("unit_x", 2, 6, 10, 64))
        ours = attention(tokens, unit_geometry(prior), prior).numpy()
    np.testing.assert_allclose(ours, UNITS[golden], atol=ATOL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [("DFormerv2-S", "dformerv2-s"), ("DFormerv2-B", "dformerv2-b")]
)
def test_stages_logits_and_classes_are_the_official_ones(name, variant, monkeypatch):
    gate.check_logits(name, variant, monkeypatch)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("DFormerv2-S", "dformerv2-s"),
        pytest.param("DFormerv2-B", "dformerv2-b", marks=pytest.mark.slow),
    ],
)
def test_names_shapes_and_norms_are_the_official_ones(name, variant):
    gate.check_names(name, variant)


def test_constants_are_written_and_loaded_but_no_parameters():
    network, other = small(), small()
    arrays = network.named_arrays()
    constants = [name for name in arrays if name.endswith((".angle", ".decay"))]
    assert len(constants) == 2 * 5
    assert not set(constants) & network.trainable().keys()
    changed = {name: 2 * arrays[name] for name in constants}
    load_arrays(other, arrays | changed, rules=())
    for name, value in changed.items():
        assert np.array_equal(other.named_arrays()[name], value)


@pytest.mark.parametrize("size", [(33, 70), (96, 31)])
def test_images_of_any_size_will_do(size):
    network = small().eval()
    image = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    with jt.no_grad():
        features = network.backbone(jt.array(image))
        logits = network.decode_head(features).numpy()
    for stride, feature in zip(network.backbone.strides, features, strict=True):
        assert tuple(feature.shape[2:]) == tuple(-(-length // stride) for length in size)
    assert np.isfinite(logits).all()


def test_a_step_reaches_every_parameter():
    network = small(*gate.NOTHING_DROPPED).train()
    draw = np.random.default_rng(0)
    image = jt.array(draw.standard_normal((2, 4, 64, 64)).astype(np.float32))
    label = jt.array(draw.integers(0, 5, (2, 64, 64)).astype(np.int32))
    parameters = network.trainable()
    loss = network.losses(image, label)["decode.loss_ce"]
    gradients = jt.grad(loss, list(parameters.values()))
    without = [
        name
        for name, gradient in zip(parameters, gradients, strict=True)
        if np.abs(gradient.numpy()).max() == 0
    ]
    assert not without
