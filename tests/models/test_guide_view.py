import pytest
import torch
import torch.nn.functional as F

from segmill.errors import SegmillError
from segmill.models.guide_view import GuideView

SQUARE = GuideView(short=32, window=32, stride=11, multiple=8)
WHOLE = GuideView(short=32, window=None, stride=None, multiple=8)


def coordinates(height: int, width: int, pixel: float = 1.0) -> torch.Tensor:
    """An image of its own coordinates: row and column of each element's centre, in pixels."""
    rows = (torch.arange(height) + 0.5) * pixel - 0.5
    columns = (torch.arange(width) + 0.5) * pixel - 0.5
    both = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([*both, torch.zeros(height, width)])[None]


@pytest.mark.parametrize("width", [32, 33, 42, 43, 44, 90])
def test_windows_cover_every_pixel_of_the_long_side_at_the_starts_of_the_rule(width):
    windows = SQUARE.windows(coordinates(32, width))
    count = -(-(width - 32) // 11) + 1
    assert windows.shape == (count, 3, 32, 32)
    starts = [min(index * 11, width - 32) for index in range(count)]
    torch.testing.assert_close(windows[:, 1, 0, 0], torch.tensor(starts).float())
    assert set(windows[:, 1].flatten().tolist()) == set(range(width))


def test_a_4_by_3_image_has_two_windows_and_a_3_by_2_image_three():
    view = GuideView(short=512, window=512, stride=171, multiple=8)
    assert view.size(480, 640) == (512, 683)
    assert len(view.windows(torch.zeros(1, 3, 480, 640, dtype=torch.uint8))) == 2
    assert len(view.windows(torch.zeros(1, 3, 400, 600, dtype=torch.uint8))) == 3


@pytest.mark.parametrize("view", [SQUARE, WHOLE])
def test_portrait_is_the_transpose_of_landscape(view):
    image = torch.rand(1, 3, 40, 77) * 255
    logits = torch.rand(1, 5, 10, 20)
    # Float32; resizing and sampling round along one axis before the other.
    close = {"atol": 1e-3, "rtol": 0.0}
    landscape, portrait = view.windows(image), view.windows(image.transpose(2, 3))
    torch.testing.assert_close(portrait, landscape.transpose(2, 3), **close)
    height, width = view.size(40, 77)
    assert view.size(77, 40) == (width, height)
    wide = view.sample(logits, size=(height, width), cell=8)
    tall = view.sample(logits.transpose(2, 3), size=(width, height), cell=8)
    torch.testing.assert_close(tall, wide.transpose(2, 3), **close)


@pytest.mark.parametrize(("height", "width"), [(32, 57), (57, 32), (32, 32)])
@pytest.mark.parametrize("cell", [4, 8, 16])
def test_logits_are_read_at_the_centres_of_the_latent_cells(height, width, cell):
    # Logits that say where they are, at stride 1: what is read is the position it was read at.
    sampled = SQUARE.sample(coordinates(height, width), size=(height, width), cell=cell)
    windows = SQUARE.windows(coordinates(height, width))
    centres = F.avg_pool2d(windows, cell)  # the mean position of the cell's own pixels
    torch.testing.assert_close(sampled, centres, atol=0.01, rtol=0)  # pixels
    inside = torch.arange(32 // cell) * cell + (cell - 1) / 2
    torch.testing.assert_close(sampled[0, 0, :, 0], inside, atol=0.01, rtol=0)


def test_logits_of_another_stride_are_read_at_the_same_places():
    logits = coordinates(20, 30, pixel=4)
    view = GuideView(short=80, window=80, stride=17, multiple=8)
    sampled = view.sample(logits, size=(80, 120), cell=8)
    centres = F.avg_pool2d(view.windows(coordinates(80, 120)), 8)
    torch.testing.assert_close(sampled, centres, atol=0.01, rtol=0)  # pixels


def test_of_an_aligned_window_it_is_crop_and_resize():
    logits = torch.rand(1, 6, 16, 22)
    view = GuideView(short=64, window=64, stride=24, multiple=8)
    sampled = view.sample(logits, size=(64, 88), cell=8)
    for window, start in zip(sampled, (0, 6), strict=True):
        crop = logits[..., start : start + 16]
        resized = F.interpolate(crop, (8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(window[None], resized, atol=1e-6, rtol=0)  # float32 rounding


def test_a_whole_image_is_one_window_with_sides_rounded_to_the_multiple():
    assert WHOLE.size(40, 61) == (32, 48)  # 48.8 is nearer to 48 than to 56
    assert WHOLE.size(40, 66) == (32, 56)
    assert WHOLE.windows(torch.zeros(1, 3, 40, 66, dtype=torch.uint8)).shape == (1, 3, 32, 56)
    assert WHOLE.sample(torch.rand(1, 5, 10, 17), size=(32, 56), cell=8).shape == (1, 5, 4, 7)


def test_pixels_of_an_image_of_the_right_size_stay_as_they_are():
    image = torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8)
    windows = GuideView(short=32, window=32, stride=8, multiple=8).windows(image)
    torch.testing.assert_close(windows[0], image[0, :, :, :32].float(), atol=0, rtol=0)
    torch.testing.assert_close(windows[1], image[0, :, :, 8:].float(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"window": 24}, "view.window=24"),
        ({"stride": None}, "view.stride=None"),
        ({"window": None}, "view.window=None"),
        ({"short": 36, "window": 36}, "multiple of view.multiple"),
        ({"stride": 0}, "view.stride=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(keys, named):
    settings = {"short": 32, "window": 32, "stride": 16, "multiple": 8} | keys
    with pytest.raises(SegmillError, match=named):
        GuideView(**settings)


def test_a_cell_that_does_not_divide_the_window_is_refused():
    with pytest.raises(SegmillError, match="latent cells of 12"):
        SQUARE.sample(torch.rand(1, 5, 8, 8), size=(32, 32), cell=12)


@pytest.mark.parametrize("view", [SQUARE, WHOLE])
def test_the_windows_of_a_batch_are_those_of_its_images_side_by_side(view):
    images, logits = torch.rand(3, 3, 40, 77) * 255, torch.rand(3, 5, 10, 20)
    size = view.size(40, 77)
    each = [view.windows(image[None]) for image in images]
    assert torch.equal(view.windows(images), torch.cat(each))
    each = [view.sample(one[None], size=size, cell=8) for one in logits]
    assert torch.equal(view.sample(logits, size=size, cell=8), torch.cat(each))


def test_logits_of_one_pixel_are_the_same_in_all_cells_and_stay_one_pixel():
    logits = torch.rand(2, 5, 1, 1)
    sampled = SQUARE.sample(logits, size=(32, 60), cell=8)
    many = SQUARE.sample(logits.expand(-1, -1, 2, 2), size=(32, 60), cell=8)
    assert sampled.shape == (len(many), 5, 1, 1)
    # The weights of a bilinear sample add up to 1 but for rounding.
    torch.testing.assert_close(sampled.expand_as(many), many, rtol=1e-6, atol=0)
