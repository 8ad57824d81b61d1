import pytest
import torch
import torch.nn.functional as F

from segmill.ops.bilinear import device_taps, interpolation_matrix, row_chunks
from segmill.ops.upsample_argmax import upsample_argmax
from segmill.ops.upsample_cross_entropy import upsample_cross_entropy


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("source", "target"), [(5, 17), (128, 683), (9, 9), (9, 4), (1, 6), (7, 1)]
)
def test_the_matrix_is_torchs_interpolation(source, target, align_corners):
    basis = torch.eye(source).reshape(source, 1, source, 1)
    expected = F.interpolate(basis, (target, 1), mode="bilinear", align_corners=align_corners)
    ours = interpolation_matrix(source, target, align_corners=align_corners, dtype=torch.float32)
    # float32 positions: torch may fuse the multiplication and the subtraction.
    torch.testing.assert_close(ours, expected[:, 0, :, 0].T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_together_are_the_whole_product(rows):
    matrix = interpolation_matrix(6, 17, align_corners=False, dtype=torch.float64)
    values = torch.randn(6, 4, dtype=torch.float64)
    parts = [weights @ values[span] for _, span, weights in row_chunks(matrix, rows)]
    torch.testing.assert_close(torch.cat(parts), matrix @ values)


@pytest.mark.parametrize(("source", "target"), [(5, 17), (9, 4), (1, 6)])
def test_starts_cut_the_target_where_the_lower_source_changes(source, target):
    taps = device_taps(source, target, align_corners=False, device=torch.device("cpu"))
    for index in range(source):
        first, last = taps.start[index], taps.start[index + 1]
        assert (taps.lower[first:last] == index).all()
    assert taps.start[0] == 0
    assert taps.start[-1] == target
    # Beyond the last source there is nothing to interpolate with.
    assert not taps.weight[taps.lower == source - 1].any()


def test_tables_made_for_inference_serve_training_too():
    logits = torch.randn(1, 3, 11, 13)
    with torch.inference_mode():
        upsample_argmax(logits, (22, 39))
    logits.requires_grad_()
    upsample_cross_entropy(logits, torch.zeros(1, 22, 39, dtype=torch.int64)).backward()
    assert logits.grad is not None
