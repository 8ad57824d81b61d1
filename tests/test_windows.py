import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmill.windows import window_starts

sizes = st.integers(1, 400)


@pytest.mark.parametrize(
    ("length", "want"), [(512, [0]), (683, [0, 171]), (1024, [0, 341, 512]), (300, [0])]
)
def test_starts_of_512_pixel_windows_at_stride_341(length, want):
    assert window_starts(length, 512, 341).tolist() == want


@given(sizes, sizes, sizes)
def test_windows_lie_inside_and_cover_every_pixel(length, window, stride):
    stride = min(stride, window)
    starts = window_starts(length, window, stride)
    assert starts[0] == 0
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= stride).all()
    assert starts[-1] + window == max(length, window)


@given(sizes, sizes, sizes)
def test_the_starts_are_mmsegmentations(length, window, stride):
    grid = max(length - window + stride - 1, 0) // stride + 1
    theirs = [max(min(i * stride + window, length) - window, 0) for i in range(grid)]
    assert window_starts(length, window, stride).tolist() == theirs


def test_a_window_without_size_is_refused():
    with pytest.raises(ValueError, match="positive sizes"):
        window_starts(10, 0, 1)
