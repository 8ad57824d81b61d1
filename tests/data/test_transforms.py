"""Against MMSegmentation 1.2.2 with mmcv 2.1.0 under the same seeds (transforms.json).

OpenCV 5.0 gives the pixels of the 4.x that made them, so everything here is compared exactly,
except where a test says otherwise.
"""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import golden
from segmill.data import transforms as T
from segmill.data.files import DataError
from segmill.data.sample import Sample

CASES = golden.component("transforms")
PIXELS = np.load(golden.FOLDER / "mmseg" / "components" / "transforms.npz")
Pair = tuple[np.ndarray, np.ndarray]


def step(name: str) -> Callable[..., Pair]:
    """Our function for one MMSegmentation transform: (image, label, rng, config) -> pair."""

    def resized(image, label, rng, config):
        if config["keep_ratio"]:
            return tuple(T.resize_keep_ratio(each, config["scale"]) for each in (image, label))
        return tuple(T.resize(each, tuple(config["scale"][::-1])) for each in (image, label))

    def to_multiple(image, label, rng, config):
        return tuple(T.resize_to_multiple(each, config["size_divisor"]) for each in (image, label))

    def shortest_edge(image, label, rng, config):
        sizes = config["scale"], config["max_size"]
        return tuple(T.resize_shortest_edge(each, *sizes) for each in (image, label))

    return {
        "Resize": resized,
        "ResizeToMultiple": to_multiple,
        "ResizeShortestEdge": shortest_edge,
        "RandomResize": lambda image, label, rng, config: T.random_resize(
            image, label, config["scale"], config["ratio_range"], rng
        ),
        "RandomCrop": lambda image, label, rng, config: T.random_crop(
            image, label, config["crop_size"], config["cat_max_ratio"], rng
        ),
        "RandomFlip": lambda image, label, rng, config: T.random_flip(
            image, label, config["prob"], rng
        ),
        "PhotoMetricDistortion": lambda image, label, rng, config: (
            T.apply_jitter(image, T.draw_jitter(rng)),
            label,
        ),
    }[name]


@pytest.mark.parametrize("case", [name for name in CASES if "seed" in CASES[name]])
def test_against_mmsegmentation(case: str):
    expected = CASES[case]
    image, label = golden.transform_inputs()
    image = np.ascontiguousarray(image[..., ::-1])  # theirs is BGR
    rng = np.random.RandomState(expected["seed"])
    for config in expected["cfg"]:
        image, label = step(config["type"])(image, label, rng, config)
    assert image.dtype == np.uint8
    assert list(image.shape) == expected["img_shape"]
    assert label.astype(int).sum() == expected["seg_sum"]
    assert image.astype(int).sum() == expected["img_sum"]
    top, left = (length // 2 - 16 for length in label.shape)
    window = np.s_[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(image[window][..., ::-1], PIXELS[f"{case}/img_crop32"])
    np.testing.assert_array_equal(label[window], PIXELS[f"{case}/seg_crop32"])


def smooth_sample(height: int, width: int, channels: int = 3, seed: int = 0) -> Sample:
    rng = np.random.RandomState(seed)
    coarse = rng.randint(0, 256, (height // 6 + 2, width // 6 + 2, channels)).astype(np.uint8)
    blocks = rng.randint(0, 5, (height // 9 + 1, width // 9 + 1)).astype(np.uint8)
    label = blocks.repeat(9, 0).repeat(9, 1)[:height, :width]
    return Sample(cv2.resize(coarse, (width, height)), np.ascontiguousarray(label), "x")


def reference_chain(sample: Sample, transform: T.TrainTransform, seed: int) -> Pair:
    rng = np.random.RandomState(seed)
    assert sample.label is not None
    if transform.short_edges is None:
        assert transform.ratio is not None
        pair = T.random_resize(sample.image, sample.label, transform.scale, transform.ratio, rng)
    else:
        edge = T.random_short_edge(transform.short_edges, rng)
        arrays, limit = (sample.image, sample.label), max(transform.scale)
        pair = tuple(T.resize_shortest_edge(each, edge, limit) for each in arrays)
    pair = T.random_crop(*pair, transform.crop, transform.cat_max_ratio, rng)
    image, label = T.random_flip(*pair, transform.flip, rng)
    return T.pad(image, transform.crop), T.pad(label, transform.crop)


# A cut whose rounded size stays, 20 x 15, while the image grows from 88 to 90.
@example(size=(20, 88), crop=(9, 8), ratio=(0.5, 2.0), channels=3, seed=1)
@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    crop=st.tuples(st.integers(8, 70), st.integers(8, 70)),
    ratio=st.sampled_from([(0.5, 2.0), (1.0, 1.0), (2.5, 6.0)]),
    channels=st.sampled_from([3, 4]),
    seed=st.integers(0, 1000),
)
def test_crop_first_equals_resize_then_crop(size, crop, ratio, channels, seed):
    transform = make_transform(scale=(80, 60), ratio=ratio, crop=crop)
    sample = smooth_sample(*size, channels=channels, seed=seed)
    ours = transform(sample, np.random.RandomState(seed))
    image, label = reference_chain(sample, transform, seed)
    np.testing.assert_array_equal(ours.label, label)
    # Bilinear weights: float32 in the warp, 11 bits in OpenCV's resize, each rounded once.
    assert np.abs(ours.image.astype(int) - image).max() <= 1
    # Padding is exact: it is what normalisation must leave at zero.
    _, _, height, width = ours.valid
    assert not ours.image[height:].any()
    assert not ours.image[:, width:].any()
    assert (ours.label[height:] == 255).all()


def make_transform(**changes) -> T.TrainTransform:
    keys = {"scale": (80, 60), "ratio": (0.5, 2.0), "crop": (32, 40), "cat_max_ratio": 0.75}
    keys |= {"short_edges": None}
    return T.TrainTransform(**{**keys, "flip": 0.5, "photometric": True, **changes})


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(20, 90), st.integers(20, 90)), seed=st.integers(0, 1000))
def test_a_short_edge_can_be_chosen_instead_of_a_ratio(size, seed):
    """Mask2Former's RandomChoiceResize of ResizeShortestEdge."""
    transform = make_transform(ratio=None, short_edges=(30, 45, 60), scale=(100, 40))
    sample = smooth_sample(*size, seed=seed)
    ours = transform(sample, np.random.RandomState(seed))
    image, label = reference_chain(sample, transform, seed)
    np.testing.assert_array_equal(ours.label, label)
    assert np.abs(ours.image.astype(int) - image).max() <= 1  # see above


def test_every_short_edge_is_drawn_alike():
    drawn = [T.random_short_edge((5, 6, 7, 8), np.random.RandomState(seed)) for seed in range(800)]
    counts = np.unique(drawn, return_counts=True)[1]
    np.testing.assert_allclose(counts, 200, atol=40)  # three sigma are 37


@pytest.mark.parametrize(("ratio", "edges"), [(None, None), ((0.5, 2.0), (256, 512))])
def test_a_size_is_drawn_in_one_way(ratio, edges):
    with pytest.raises(DataError, match=r"data\.ratio.*set one and make the other null"):
        make_transform(ratio=ratio, short_edges=edges)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 200), st.integers(40, 200)),
    factor=st.floats(0.5, 2.0),
    seed=st.integers(0, 1000),
)
def test_the_image_is_exact_unless_the_crop_is_a_small_part(size, factor, seed):
    # A crop of half the edges: four times its area is below the switch to warping.
    resized = T.keep_ratio_size(*size, (int(200 * factor), int(200 * factor)))
    crop = (resized[0] // 2 + 1, resized[1] // 2 + 1)
    transform = make_transform(
        scale=(int(200 * factor),) * 2, ratio=(1.0, 1.0), crop=crop, cat_max_ratio=1.0
    )
    sample = smooth_sample(*size, seed=seed)
    image, _ = reference_chain(sample, transform, seed)
    ours = transform(sample, np.random.RandomState(seed))
    np.testing.assert_array_equal(ours.image, image)


def test_a_small_crop_of_a_large_image_is_warped():
    transform = make_transform(scale=(400, 400), ratio=(1.0, 1.0))
    sample = smooth_sample(60, 60)
    images = [transform(sample, np.random.RandomState(seed)).image for seed in range(5)]
    chains = [reference_chain(sample, transform, seed)[0] for seed in range(5)]
    assert any((ours != theirs).any() for ours, theirs in zip(images, chains, strict=True))


def test_crop_is_drawn_again_while_one_class_dominates():
    label = np.zeros((64, 64), np.uint8)
    label[:, 48:] = 1
    label[:8] = 255
    sample = Sample(np.zeros((64, 64, 3), np.uint8), label, "x")
    shares = []
    for seed in range(40):
        transform = make_transform(scale=(64, 64), ratio=(1.0, 1.0), crop=(24, 24), flip=0.0)
        part = transform(sample, np.random.RandomState(seed)).label
        shares.append(np.bincount(part[part != 255], minlength=2).max() / (part != 255).sum())
    # One draw succeeds with 10 / 41, so eleven fail in 5 % of the samples.
    assert np.mean(np.array(shares) < 0.75) > 0.8


def test_without_photometric_the_jitter_changes_nothing():
    sample = make_transform(photometric=False)(smooth_sample(60, 60), np.random.RandomState(0))
    np.testing.assert_array_equal(T.apply_jitter(sample.image, sample.jitter), sample.image)


def test_jitter_is_drawn_with_the_published_frequencies():
    drawn = np.stack([T.draw_jitter(np.random.RandomState(seed)) for seed in range(2000)])
    used = (drawn != T.NO_JITTER).mean(0)
    np.testing.assert_allclose(used, 0.5, atol=0.04)  # 2000 coins: three sigma are 0.034
    low, high = drawn.min(0), np.where(drawn == T.FULL_TURN, 0, drawn).max(0)
    assert (low >= [-32, 0, 0.5, 0.5, -18]).all()
    assert (high <= [32, 1, 1.5, 1.5, 17]).all()


def test_depth_follows_the_image():
    base = smooth_sample(60, 60)
    sample = Sample(np.dstack([base.image, base.image[..., :1]]), base.label, "x")
    image = make_transform()(sample, np.random.RandomState(3)).image
    np.testing.assert_array_equal(image[..., 3], image[..., 0])


def test_shortest_edge_respects_the_longest():
    image = np.zeros((100, 400, 3), np.uint8)
    assert T.resize_shortest_edge(image, 512, 1024).shape == (256, 1024, 3)


@given(length=st.integers(1, 3000), resized=st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_nearest_index_is_opencvs(length: int, resized: int):
    row = np.arange(length, dtype=np.uint16)[None]
    expected = cv2.resize(row, (resized, 1), interpolation=cv2.INTER_NEAREST)[0]
    np.testing.assert_array_equal(T.nearest_index(length, resized), expected)
