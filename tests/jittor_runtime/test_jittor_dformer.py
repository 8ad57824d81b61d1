"""DFormer on Jittor, against the official code's golden values; and what every network does."""

import re

import numpy as np
import pytest

jt = pytest.importorskip("jittor")

import jittor_gate as gate

from golden import FOLDER, DFormerGolden, dformer_normal, dformer_state
from segmill.checkpoint.read import CheckpointError
from segmill.errors import SegmillError
from segmill.jittor import random
from segmill.jittor.adamw import AdamW
from segmill.jittor.load import load_arrays, shapes_of
from segmill.jittor.models.backbones import dformer
from segmill.jittor.models.discriminative import Discriminative
from segmill.jittor.models.layers import resize

pytestmark = pytest.mark.jittor
SMALL_TRUNK = (
    "model.network.backbone.widths=[8,16,32,32]",
    "model.network.backbone.depths=[1,1,1,2]",
    "model.network.backbone.heads=[1,2,2,2]",
    "model.network.backbone.mlp_ratios=[2,2,1,1]",
)
RGBD = {"mean": [0.485, 0.456, 0.406, 0.48], "std": [0.229, 0.224, 0.225, 0.28]}


def small(*overrides, seed=0):
    random.seed(seed)
    return gate.build("dformer-tiny", *SMALL_TRUNK, *gate.SMALL_HEAD, *overrides, num_classes=5)


def normal(*shape):
    return jt.array(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def test_one_block_computes_the_official_numbers():
    units = np.load(FOLDER / "dformer" / "units.npz")
    sizes = {"width": 64, "heads": 2, "mlp_ratio": 4, "pooled": True, "ends_depth": False}
    block = dformer.Block(**sizes, rate=0.0)
    load_arrays(block, dformer_state(shapes_of(block), prefix="unit.blk."), rules=())
    colour, depth = dformer_normal("unit_bx", 2, 9, 11, 64), dformer_normal("unit_be", 2, 9, 11, 32)
    with jt.no_grad():
        ours, ours_depth = block(jt.array(colour), jt.array(depth))
    np.testing.assert_allclose(ours.numpy(), units["blk_out"], atol=1e-5)  # values up to 12
    np.testing.assert_allclose(ours_depth.numpy(), units["blk_out_e"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("DFormer-Tiny", "dformer-tiny"),
        pytest.param("DFormer-Small", "dformer-small", marks=pytest.mark.slow),
    ],
)
def test_stages_logits_and_classes_are_the_official_ones(name, variant, monkeypatch):
    gate.check_logits(name, variant, monkeypatch)


@pytest.mark.parametrize(
    ("name", "variant"), [("DFormer-Tiny", "dformer-tiny"), ("DFormer-Small", "dformer-small")]
)
def test_names_shapes_and_norms_are_the_official_ones(name, variant):
    gate.check_names(name, variant)


def test_three_steps_of_training_are_the_official_ones(monkeypatch):
    golden = DFormerGolden("trainstep_DFormer-Tiny")
    network = gate.official("DFormer-Tiny", "dformer-tiny", *gate.NOTHING_DROPPED).train()
    gate.use_official_bases(monkeypatch)
    image = gate.golden_image(prefix="train_", batch=2, size=(96, 128))
    label = jt.array(golden.data["label"].astype(np.int32))
    parameters, optimizer = network.trainable(), official_optimizer(network)
    losses = []
    for step, rate in enumerate(golden.meta["lr_used"]):
        for group in optimizer.groups:
            group["lr"] = rate
        (loss,) = network.losses(image, label).values()
        found = dict(zip(parameters, jt.grad(loss, list(parameters.values())), strict=True))
        optimizer.step(found)
        losses.append(loss.item())
        if step == 0:
            check_gradients(found, golden)
            check_statistics(network, golden)
    np.testing.assert_allclose(losses, golden.meta["losses"], atol=2.5e-5)  # float32 of size 4


def official_optimizer(network):
    """Convolutions' and layers' weights decay, their biases and the rest do not."""
    updated = {
        name: parameter
        for name, parameter in network.trainable().items()
        if not any(re.fullmatch(each, name) for each in dformer.NEVER_UPDATED)
    }
    decaying = {name: p for name, p in updated.items() if p.ndim > 1}
    others = {name: p for name, p in updated.items() if p.ndim == 1}
    assert (len(decaying), len(others)) == (239, 262)  # as in the official groups
    groups = [
        {"params": decaying, "lr": 0.0, "weight_decay": 0.01},
        {"params": others, "lr": 0.0, "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=(0.9, 0.999))


def check_gradients(gradients, golden):
    """Norms against float64 within 5e-3 (a ReLU near zero flips), three gradients in full."""
    assert gradients.keys() == golden.meta["grad_norm_f64"].keys()
    for name, norm in golden.meta["grad_norm_f64"].items():
        ours = np.linalg.norm(gradients[name].numpy().astype(np.float64))
        # Biases before a norm have none in exact arithmetic.
        np.testing.assert_allclose(ours, norm, rtol=5e-3, atol=1e-6, err_msg=name)
    for name in (each for each in golden.data if each.startswith("grad:")):
        ours, full = gradients[name.removeprefix("grad:")].numpy(), golden.data[name]
        assert np.linalg.norm(ours - full) <= 5e-3 * np.linalg.norm(full)


def check_statistics(network, golden):
    arrays = network.named_arrays()
    for name, theirs in golden.meta["bn"].items():
        # Sums of up to 512 float32 that went through the whole network.
        np.testing.assert_allclose(arrays[name].sum(dtype=np.float64), theirs, rtol=1e-4, atol=1e-4)
    counters = [value for name, value in arrays.items() if name.endswith("tracked")]
    assert all(value == 1 for value in counters)


def test_only_channel_three_is_depth():
    backbone, image = small().backbone.eval(), normal(1, 6, 64, 64)
    with jt.no_grad():
        whole, four = backbone(image), backbone(image[:, :4])
        other = backbone(jt.concat([image[:, :3], normal(1, 1, 64, 64) + 1], dim=1))
    for stage in range(4):
        assert np.array_equal(whole[stage].numpy(), four[stage].numpy())
    assert not np.array_equal(whole[3].numpy(), other[3].numpy())


def test_an_image_without_depth_names_the_remedy():
    with pytest.raises(SegmillError, match=r"data\.channels=4"):
        small().backbone(normal(1, 3, 64, 64))


@pytest.mark.parametrize("size", [(33, 70), (96, 31)])
def test_images_of_any_size_will_do(size):
    network = small().eval()
    with jt.no_grad():
        features = network.backbone(normal(2, 4, *size))
        logits = network.decode_head(features).numpy()
    for stride, feature in zip(network.backbone.strides, features, strict=True):
        assert tuple(feature.shape[2:]) == tuple(-(-length // stride) for length in size)
    assert logits.shape[2:] == tuple(features[1].shape[2:])
    assert np.isfinite(logits).all()


def test_the_loss_is_the_mean_over_the_labelled_pixels_of_the_batch():
    network, image = small(*gate.NOTHING_DROPPED).eval(), normal(2, 4, 64, 64)
    label = np.random.default_rng(0).integers(0, 5, (2, 64, 64)).astype(np.int32)
    label[0, :, 3:] = 255
    saved = random.state()
    loss = network.losses(image, jt.array(label))["decode.loss_ce"].item()
    random.set_state(saved)
    logits = resize(network(image), (64, 64)).numpy().astype(np.float64)
    log_prob = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    valid = label != 255
    chosen = np.take_along_axis(log_prob, np.where(valid, label, 0)[:, None], axis=1)[:, 0]
    assert loss == pytest.approx(-chosen[valid].mean(), rel=1e-5)


def test_a_batch_without_any_label_costs_nothing():
    label = jt.array(np.full((1, 64, 64), 255, np.int32))
    assert small().losses(normal(1, 4, 64, 64), label)["decode.loss_ce"].item() == 0.0


def test_statistics_and_constants_are_no_parameters():
    network = small()
    others = network.named_arrays().keys() - network.trainable().keys()
    assert {name.rsplit(".", 1)[-1] for name in others} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_evaluation_between_steps_leaves_the_gradients_as_they_were():
    network, image = small(*gate.NOTHING_DROPPED), normal(2, 4, 64, 64)
    label = jt.array(np.zeros((2, 64, 64), np.int32))
    load_arrays(network.eval(), network.named_arrays(), rules=())
    network(image).sync()
    network.train()
    parameters = network.trainable()
    loss = network.losses(image, label)["decode.loss_ce"]
    gradients = jt.grad(loss, list(parameters.values()))
    assert all(np.abs(gradient.numpy()).max() > 0 for gradient in gradients)


def test_what_one_network_writes_another_loads():
    first, second = small(), small(seed=1)
    first(normal(2, 4, 64, 64)).sync()
    written = first.named_arrays()
    report = load_arrays(second, written, rules=())
    assert len(report.loaded) == len(written)
    for name, array in second.named_arrays().items():
        assert np.array_equal(array, written[name]), name


def test_official_files_drop_what_no_forward_pass_used():
    network = small()
    extra = {"backbone.norm0.weight": np.ones(8, np.float32)}
    rules = network.key_rules()["dformer"]
    report = load_arrays(network, network.named_arrays() | extra, rules=rules)
    assert report.unused == ()


def test_a_file_that_does_not_fit_changes_nothing():
    network = small()
    before = network.named_arrays()
    arrays = {name: array + 1 for name, array in before.items()}
    del arrays["backbone.stages.0.0.attn.q.weight"]
    with pytest.raises(CheckpointError, match=r"backbone\.stages\.0\.0\.attn\.q\.weight"):
        load_arrays(network, arrays, rules=())
    for name, array in network.named_arrays().items():
        assert np.array_equal(array, before[name])


def test_the_same_seed_starts_the_same_network():
    first, second = small().named_arrays(), small().named_arrays()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_other_windows_than_the_official_are_refused():
    with pytest.raises(SegmillError, match=r"\[0, 7, 5, 7\]"):
        small("model.network.backbone.windows=[0,7,5,7]")


def test_pixels_are_normalised_in_the_order_that_the_network_sees():
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 2, 3)).astype(np.uint8)
    usual = Discriminative(network=small(), **RGBD).normalise(image).numpy()
    blue_first = Discriminative(network=small(), **RGBD, channel_order="bgr").normalise(image)
    mean, std = (np.array(RGBD[key])[:, None, None] for key in ("mean", "std"))
    np.testing.assert_allclose(usual, (image / 255 - mean) / std, atol=1e-6)
    np.testing.assert_allclose(
        blue_first.numpy(), (image[:, [2, 1, 0, 3]] / 255 - mean) / std, atol=1e-6
    )


def test_pixels_outside_of_the_box_are_the_mean_colour():
    image = np.full((2, 4, 5, 6), 200, np.uint8)
    valid = np.array([[1, 2, 4, 6], [0, 0, 5, 6]])
    normal_image = Discriminative(network=small(), **RGBD).normalise(image, valid).numpy()
    inside = np.zeros((2, 5, 6), bool)
    inside[0, 1:4, 2:6] = inside[1] = True
    assert (normal_image[:, 0][inside] != 0).all()
    assert (normal_image[:, 0][~inside] == 0).all()


def test_images_of_other_channels_and_unknown_labels_are_refused():
    model = Discriminative(network=small(), **RGBD)
    with pytest.raises(SegmillError, match=r"data\.channels=3"):
        model.normalise(np.zeros((1, 3, 4, 4), np.uint8))
    with pytest.raises(SegmillError, match="value 5, but there are 5 classes"):
        model.losses(np.zeros((1, 4, 64, 64), np.uint8), np.full((1, 64, 64), 5, np.uint8))
