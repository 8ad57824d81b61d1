"""The class map of bilinearly upsampled logits, without the upsampled logits.

The class with the largest logit at low resolution is not the answer: between two cells a third
class can win. On the CPU in chunks of output rows that fit the cache; on CUDA by a Triton kernel.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from segmill.ops.bilinear import interpolation_matrix, row_chunks

CHUNK = 2**19  # elements of upsampled logits alive at once: 2 MiB of float32, about an L2
BAND = 16  # chunks whose rows of logits are widened together; neighbours share one row


@torch.no_grad()
def upsample_argmax(
    logits: Float[Tensor, "B K h w"], size: tuple[int, int], *, align_corners: bool = False
) -> UInt8[Tensor, "B H W"] | Int[Tensor, "B H W"]:
    """Argmax over the classes at `size`, uint8 up to 256 classes; the lowest class wins a tie."""
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    if logits.is_cuda:
        # Imported here: triton is absent from CPU builds of torch.
        from segmill.ops.triton_argmax import upsample_argmax_cuda

        return upsample_argmax_cuda(logits, size, align_corners=align_corners, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        preds = [_argmax(image, size, align_corners) for image in logits]
    return torch.stack(preds).to(dtype)


def _argmax(
    image: Float[Tensor, "K h w"], size: tuple[int, int], align_corners: bool
) -> Float[Tensor, "H W"]:
    K, h, _ = image.shape
    H, W = size
    real = torch.float64 if image.dtype == torch.float64 else torch.float32
    rows = interpolation_matrix(h, H, align_corners=align_corners, dtype=real)
    # K for class 0 down to 1: the largest of the winners is the lowest class.
    places = torch.arange(K, 0, -1, dtype=real).unsqueeze(1)
    pred = torch.empty(size, dtype=real)
    chunk = max(1, CHUNK // (K * W))
    for band, band_span, band_matrix in row_chunks(rows, BAND * chunk):
        narrow = image[:, band_span].to(real).transpose(0, 1).unsqueeze(2)
        wide = F.interpolate(narrow, (1, W), mode="bilinear", align_corners=align_corners)
        for output, span, matrix in row_chunks(band_matrix, chunk):
            z = (matrix @ wide[span].flatten(1)).reshape(-1, K, W)
            # Three vectorised passes; torch's own argmax of an inner axis takes four times as long.
            winners = z.eq_(z.amax(1, keepdim=True)).mul_(places)
            pred[band][output] = K - winners.amax(1)
    return pred.clamp_(max=K - 1)  # NaN logits have no winner
