"""The corruptions equal the originals; the golden values are row and column sums of their pictures.

`goldens/corruptions.npz`: `NAME_sSEVERITY` and `NAME_seedSEED_sSEVERITY` are sums over the pictures
that imagecorruptions made of an ADE20K image at 128 x 171 (not ours to copy), `scene_*` over those
that this package made of a generated room when it equalled the others.
"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from segmill.data import corruption_blur, corruption_digital, corruption_steps, frost_textures
from segmill.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corruption_seed
from segmill.data.scenes import render_scene
from segmill.errors import SegmillError

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "corruptions.npz")
ORIGINAL = sorted(key for key in GOLDEN if not key.startswith(("input", "scene")))


def sums(picture: np.ndarray) -> np.ndarray:
    """Per channel the sum of every row, then of every column."""
    parts = [picture.sum(1, dtype=np.int64), picture.sum(0, dtype=np.int64)]
    return np.concatenate(parts)


def assert_same_picture(picture: np.ndarray, expected: np.ndarray):
    """Exact, or 1 level in 1e-4 of the values: other NumPy and OpenCV round otherwise."""
    distance = np.abs(sums(picture) - expected)
    rows, columns = distance[: len(picture)], distance[len(picture) :]
    assert max(rows.sum(), columns.sum()) <= 1e-4 * picture.size
    assert distance.max() <= 1


@pytest.fixture(scope="module")
def frost_dir(real_data: Path) -> Path:
    return real_data / "samples" / "frost"


@pytest.fixture(scope="module")
def ade_image(real_data: Path) -> np.ndarray:
    path = real_data / "samples" / "ade20k" / "images" / "ADE_val_00000001.jpg"
    with Image.open(path) as image:
        small = image.convert("RGB").resize((171, 128), Image.Resampling.BICUBIC)
    small = np.asarray(small)
    assert (sums(small) == GOLDEN["input"]).all(), "Pillow reads or resizes the image otherwise"
    return small


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return render_scene(7, height=96, width=129).image[..., :3]


def noisy_picture(height: int, width: int) -> np.ndarray:
    """Any picture with flat, saturated and busy parts."""
    rng = np.random.RandomState(height * 1000 + width)
    picture = rng.randint(0, 256, size=(height, width, 3)).astype(np.uint8)
    picture[: height // 3] = 255
    picture[-height // 4 :, : width // 2] = (0, 100, 200)
    return picture


@pytest.mark.parametrize("key", ORIGINAL)
def test_against_imagecorruptions(key: str, ade_image: np.ndarray, frost_dir: Path):
    name, severity = key.rsplit("_s", 1)
    name, _, seed = name.partition("_seed")
    picture = corrupt(ade_image, name, int(severity), int(seed or 0), frost_dir)
    assert_same_picture(picture, GOLDEN[key])


def test_the_golden_values_cover_every_corruption():
    assert {key.rsplit("_s", 1)[0].partition("_seed")[0] for key in ORIGINAL} == set(CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_generated_room_is_corrupted_as_ever(name: str, scene: np.ndarray):
    for severity in SEVERITIES:
        picture = corrupt(scene, name, severity, 3)
        assert_same_picture(picture, GOLDEN[f"scene_{name}_s{severity}"])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_and_odd_sizes_keep_their_shape_and_show_a_change(name: str):
    for height, width in ((32, 32), (33, 61), (32, 77), (91, 35)):
        image = noisy_picture(height, width)
        for severity in SEVERITIES:
            picture = corrupt(image, name, severity, 5)
            assert picture.shape == image.shape
            assert picture.dtype == np.uint8
            assert picture.flags.writeable
        assert (picture != image).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_black_and_white_images_raise_no_warning(name: str):
    for level in (0, 255):
        image = np.full((40, 50, 3), level, np.uint8)
        for severity in SEVERITIES:
            corrupt(image, name, severity, 0)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_alone_decides_and_global_randomness_stays(name: str):
    image = noisy_picture(48, 64)
    image.setflags(write=False)
    np.random.seed(1)
    before = np.random.get_state()
    first = corrupt(image, name, 3, 11)
    after = np.random.get_state()
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    np.random.seed(2)
    np.testing.assert_array_equal(corrupt(image, name, 3, 11), first)
    np.testing.assert_array_equal(corrupt(image[:, ::-1][:, ::-1], name, 3, 11), first)


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "frost", "fog", "snow"])
def test_another_seed_gives_another_picture(name: str):
    image = noisy_picture(48, 64)
    assert (corrupt(image, name, 3, 0) != corrupt(image, name, 3, 1)).any()


def test_corruption_seeds_are_stable_and_differ():
    assert corruption_seed("ADE_val_00000001", "fog", 5) == 2268648533
    seeds = {
        corruption_seed(image, name, severity)
        for image in ("a", "b")
        for name in CORRUPTIONS
        for severity in SEVERITIES
    }
    assert len(seeds) == 2 * len(CORRUPTIONS) * len(SEVERITIES)
    assert all(0 <= seed < 2**32 for seed in seeds)


# What is computed otherwise than in the original, against the plain way.


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(32, 130),
    width=st.integers(32, 130),
    factor=st.sampled_from([1.01, 1.05, 1.1, 1.11, 1.15, 1.24, 1.3, 2.0, 2.5, 3.0, 4.0, 4.5]),
)
def test_zoom_equals_scipys_zoom_of_the_central_crop(height: int, width: int, factor: float):
    image = (noisy_picture(height, width) / 255).astype(np.float32)
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = image[top : top + rows, left : left + columns]
    expected = ndimage.zoom(crop, (factor, factor, 1), order=1)
    assert expected.shape[0] >= height
    assert expected.shape[1] >= width
    # Both round a float64 to float32: at most one unit in the last place apart.
    np.testing.assert_allclose(corruption_steps.zoom(image, factor), expected, rtol=2e-7, atol=0)


def glass_pixel_by_pixel(pixels: np.ndarray, reach: int, rng: np.random.RandomState) -> np.ndarray:
    pixels = pixels.copy()
    height, width = pixels.shape[:2]
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            right, down = rng.randint(-reach, reach, size=2)
            pixels[row, column] = pixels[row + down, column + right]
    return pixels


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (37, 50), (64, 33)])
def test_glass_copies_pixels_one_after_the_other(reach: int, size: tuple[int, int]):
    pixels = noisy_picture(*size)
    expected = glass_pixel_by_pixel(pixels, reach, np.random.RandomState(3))
    ours = corruption_blur._copy_from_neighbours(pixels, reach, np.random.RandomState(3))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("angle", [-135.0, -77.7, 0.0, 12.3, 44.9])
@pytest.mark.parametrize("size", [(32, 40), (75, 36)])
def test_smear_adds_the_shifted_pictures_in_order(angle: float, size: tuple[int, int]):
    image, radius, sigma = noisy_picture(*size).astype(np.float64), 20, 15.0
    weights = np.exp(-(np.arange(41) ** 2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    weights /= weights.sum()
    expected = np.zeros_like(image)
    for step, weight in enumerate(weights):
        down = -math.ceil(step * math.sin(math.radians(angle)) - 0.5)
        right = -math.ceil(step * math.cos(math.radians(angle)) - 0.5)
        if abs(down) >= size[0] or abs(right) >= size[1]:
            break
        rows = np.clip(np.arange(size[0]) - down, 0, size[0] - 1)
        columns = np.clip(np.arange(size[1]) - right, 0, size[1] - 1)
        expected = expected + weight * image[rows][:, columns]
    ours = corruption_steps.smear(image, radius=radius, sigma=sigma, angle=angle)
    np.testing.assert_array_equal(ours, expected)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(8, 40), width=st.integers(8, 40), reach=st.floats(0.1, 60))
def test_elastic_samples_as_scipys_map_coordinates(height: int, width: int, reach: float):
    image = (noisy_picture(height, width) / 255).astype(np.float32)
    rng = np.random.RandomState(height)
    row = np.arange(height)[:, None] + rng.uniform(-reach, reach, size=(height, width))
    column = np.arange(width) + rng.uniform(-reach, reach, size=(height, width))
    expected = np.stack(
        [
            ndimage.map_coordinates(image[..., channel], (row, column), order=1, mode="reflect")
            for channel in range(3)
        ],
        axis=-1,
    )
    # Both round a float64 to float32; far outside, SciPy's folding loses a few bits more.
    np.testing.assert_allclose(
        corruption_digital._sample(image, row, column), expected, rtol=2e-7, atol=1e-7
    )


def test_zoom_reads_0_where_rounding_leaves_the_picture_as_scipy_does():
    image = np.ones((36, 36, 1))
    assert (corruption_steps.zoom(image, 1.2000000000000002)[-1] == 0).all()


def test_a_small_picture_without_a_drop_stays_as_it_is():
    image = np.full((32, 32, 3), 90, np.uint8)
    picture = corrupt(image, "spatter", 1, 81)  # a seed whose liquid stays below the threshold
    assert (picture == picture[0, 0]).all()
    assert picture.min() >= 89  # cut off to 8 bits


# Frost


def test_generated_frost_has_the_sizes_and_brightness_of_the_photographs(frost_dir: Path):
    photographs = frost_textures.read_frost(frost_dir)
    generated = frost_textures.generated_frost()
    assert [each.shape for each in generated] == [each.shape for each in photographs]
    for ours, theirs in zip(generated, photographs, strict=True):
        # By eye alike: a tenth of the range in the mean, a third in the contrast.
        assert abs(ours.mean() - theirs.mean()) < 10
        assert 0.67 < ours.std() / theirs.std() < 1.5


def test_generated_textures_differ_and_are_made_once():
    first, again = frost_textures.generated_frost(), frost_textures.generated_frost()
    assert first is again
    assert len({each.tobytes() for each in first}) == 5


def test_a_frost_folder_changes_frost(frost_dir: Path, scene: np.ndarray):
    assert (corrupt(scene, "frost", 5, 0, frost_dir) != corrupt(scene, "frost", 5, 0)).any()


def test_frost6_is_never_needed(frost_dir: Path, scene: np.ndarray, tmp_path: Path):
    for name in frost_textures.FILES:
        shutil.copy(frost_dir / name, tmp_path / name)
    expected = corrupt(scene, "frost", 2, 4, frost_dir)
    np.testing.assert_array_equal(corrupt(scene, "frost", 2, 4, str(tmp_path)), expected)


def test_a_frost_folder_without_its_files_is_refused(tmp_path: Path):
    for name in frost_textures.FILES[:-1]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SegmillError, match=r"lacks frost5\.jpg\. It must hold"):
        corrupt(noisy_picture(40, 40), "frost", 1, 0, tmp_path)
    (tmp_path / "frost5.jpg").write_bytes(b"no picture")
    with pytest.raises(SegmillError, match=r"frost1\.png cannot be decoded"):
        corrupt(noisy_picture(40, 40), "frost", 1, 0, tmp_path)


# Mistakes


def test_an_unknown_corruption_names_its_neighbours():
    with pytest.raises(SegmillError, match="did you mean gaussian_noise or gaussian_blur"):
        corrupt(noisy_picture(40, 40), "gausian_noise", 1, 0)
    with pytest.raises(SegmillError, match=r"no corruption 'rain'; There are gaussian_noise, shot"):
        corrupt(noisy_picture(40, 40), "rain", 1, 0)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_a_severity_outside_1_to_5_is_refused(severity: int):
    with pytest.raises(SegmillError, match="severities are 1"):
        corrupt(noisy_picture(40, 40), "fog", severity, 0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 3), np.float32),
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((3, 40, 40), np.uint8),
    ],
)
def test_images_that_are_not_rgb_of_8_bits_are_refused(image: np.ndarray):
    with pytest.raises(SegmillError, match=r"uint8 \(H, W, 3\)"):
        corrupt(image, "fog", 1, 0)


def test_an_image_below_32_pixels_is_refused():
    with pytest.raises(SegmillError, match="31 x 40 pixels is too small"):
        corrupt(noisy_picture(31, 40), "fog", 1, 0)
