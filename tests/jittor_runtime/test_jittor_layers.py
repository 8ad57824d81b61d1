"""The layers against torch's numbers, and what is drawn at random."""

import numpy as np
import pytest

jt = pytest.importorskip("jittor")

from golden import FOLDER, dformer_bases, dformer_normal
from segmill.jittor import random
from segmill.jittor.models import layers
from segmill.jittor.models.hamburger import NMF

pytestmark = pytest.mark.jittor
UNITS = np.load(FOLDER / "dformer" / "units.npz")
RESIZE = np.load(FOLDER / "dformer" / "resize_gelu.npz")
ATOL = 1e-6  # sums of a few float32 of size 1
GRIDS = [name.removeprefix("pool7_in_") for name in UNITS.files if name.startswith("pool7_in_")]
SIZES = [name for name in RESIZE.files if name.endswith(("_ac0", "_ac1"))]


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", SIZES)
def test_bilinear_resizing_is_torchs(name):
    _, size, corners = name.split("_")
    height, width = map(int, size.split("x"))
    image = jt.array(RESIZE["resize_in"])
    ours = layers.resize(image, (height, width), align_corners=corners == "ac1")
    np.testing.assert_allclose(ours.numpy(), RESIZE[name], atol=3e-6)  # torch places in float32


@pytest.mark.parametrize("grid", GRIDS)
def test_adaptive_pooling_is_torchs_for_any_size(grid):
    ours = layers.adaptive_average_pool(jt.array(UNITS[f"pool7_in_{grid}"]), 7)
    np.testing.assert_allclose(ours.numpy(), UNITS[f"pool7_out_{grid}"], atol=ATOL)


def test_gelu_is_the_exact_one():
    ours = layers.GELU()(jt.array(RESIZE["gelu_x"]))
    np.testing.assert_allclose(ours.numpy(), RESIZE["gelu_y"], atol=ATOL)


@pytest.mark.parametrize("training", [False, True])
def test_factorisation_is_the_official_one(training, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda shape: dformer_bases(*shape))
    module = NMF(rank=64, train_steps=6, eval_steps=7)
    module.is_train = training
    with jt.no_grad():
        ours = module(jt.array(np.maximum(dformer_normal("unit_nmf", 2, 512, 6, 8), 0)))
    theirs = UNITS["nmf_out_train" if training else "nmf_out_eval"]
    # Values up to 3 after seven updates; the official ones are 1.5e-5 from float64, ours 3.6e-5.
    np.testing.assert_allclose(ours.numpy(), theirs, atol=5e-5)


def test_a_large_mean_does_not_spoil_layer_norm():
    tokens = normal(2, 3, 16) + 1000
    ours = layers.LayerNorm(16, eps=1e-6)(jt.array(tokens)).numpy()
    exact = tokens.astype(np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(ours, exact, atol=2e-4)  # the mean has steps of 6e-5


def test_batch_norm_keeps_the_population_s_variance_and_counts_batches():
    feature, norm = normal(2, 4, 3, 5), layers.BatchNorm2d(4, eps=1e-5)
    for _ in range(2):
        trained = norm(jt.array(feature)).numpy()
    mean, variance = feature.mean((0, 2, 3)), feature.var((0, 2, 3))
    wide = (slice(None), None, None)
    expected = (feature - mean[wide]) / np.sqrt(variance[wide] + 1e-5)
    np.testing.assert_allclose(trained, expected, atol=1e-5)
    running_var = 0.81 + 0.19 * variance * 30 / 29
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.19 * mean, atol=ATOL)
    np.testing.assert_allclose(norm.running_var.numpy(), running_var, atol=ATOL)
    assert norm.num_batches_tracked == 2
    evaluated = norm.eval()(jt.array(feature)).numpy()
    expected = (feature - 0.19 * mean[wide]) / np.sqrt(running_var[wide] + 1e-5)
    np.testing.assert_allclose(evaluated, expected, atol=1e-5)
    assert norm.num_batches_tracked == 2


def test_linear_and_1x1_convolution_are_the_same_product():
    feature, linear = normal(2, 6, 3, 5), layers.Linear(6, 4)
    pointwise = layers.PointwiseConv(6, 4, bias=True)
    pointwise.weight.update(linear.weight.reshape(4, 6, 1, 1))
    pointwise.bias.update(linear.bias)
    expected = np.einsum("bdhw,ed->behw", feature, linear.weight.numpy())
    expected += linear.bias.numpy()[:, None, None]
    ours = linear(jt.array(feature.transpose(0, 2, 3, 1))).numpy().transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, expected, atol=ATOL)
    np.testing.assert_allclose(pointwise(jt.array(feature)).numpy(), expected, atol=ATOL)


def test_uniform_numbers_are_those_of_torch():
    random.seed(0)
    # torch.manual_seed(0); torch.rand(4)
    expected = [0.49625658988952637, 0.7682217955589294, 0.08847743272781372, 0.13203048706054688]
    assert random.uniform((4,)).tolist() == expected


def test_the_stream_continues_from_a_saved_position():
    random.seed(3)
    random.uniform((5, 7))
    saved = random.state()
    first = random.normal((1000,))
    random.set_state(saved)
    assert np.array_equal(random.normal((1000,)), first)
    assert not np.array_equal(random.normal((1000,)), first)


def test_normal_numbers_have_mean_0_and_variance_1():
    random.seed(0)
    draws = random.normal((100_000,))
    # Five standard errors.
    assert abs(draws.mean()) < 0.016
    assert abs(draws.var() - 1) < 0.023


@pytest.mark.parametrize("shape", [(64, 3, 3, 8), (64, 8, 3, 3)])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(shape):
    random.seed(0)
    ours = layers.DropPath(0.25)(jt.ones(shape)).numpy().reshape(64, -1)
    assert set(np.unique(ours)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.array_equal(ours, np.repeat(ours[:, :1], ours.shape[1], axis=1))
    assert 6 < (ours[:, 0] == 0).sum() < 26  # three standard deviations around 16


def test_dropout_drops_whole_channels():
    random.seed(0)
    ours = layers.Dropout2d(0.5)(jt.ones((4, 32, 3, 3))).numpy().reshape(128, 9)
    assert set(np.unique(ours)) == {0.0, 2.0}
    assert np.array_equal(ours, np.repeat(ours[:, :1], 9, axis=1))
    assert 47 < (ours[:, 0] == 0).sum() < 81  # three standard deviations around 64


@pytest.mark.parametrize("kind", [layers.DropPath, layers.Dropout2d])
def test_nothing_is_dropped_or_drawn_in_eval(kind):
    saved = random.state()
    assert np.array_equal(kind(0.9).eval()(jt.ones((2, 4, 3, 3))).numpy(), np.ones((2, 4, 3, 3)))
    assert random.state()["position"] == saved["position"]
