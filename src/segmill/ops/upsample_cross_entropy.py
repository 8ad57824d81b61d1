"""Cross-entropy of bilinearly upsampled logits, without the upsampled logits.

Upsampling is linear, so the gradient with respect to the low-resolution logits is the transposed
interpolation of (probability - target). On the CPU both are computed in chunks of output rows that
fit the cache, the gradient already during the forward pass; on CUDA by Triton kernels.
"""

import itertools
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from segmill.errors import SegmillError
from segmill.ops.bilinear import RowChunk, interpolation_matrix, row_chunks

CHUNK = 2**19  # elements of upsampled logits alive at once: 2 MiB of float32, about an L2
BAND = 16  # chunks whose rows of logits are widened together; neighbours share one row


def upsample_cross_entropy(
    logits: Float[Tensor, "B K h w"],
    label: Int[Tensor, "B H W"] | UInt8[Tensor, "B H W"],
    *,
    align_corners: bool = False,
    ignore_index: int = 255,
    class_weight: Float[Tensor, " K"] | None = None,
    label_smoothing: float = 0.0,
    average: Literal["all", "valid"] = "all",
) -> Float[Tensor, ""]:
    """Mean cross-entropy at the label's resolution, in float32 (float64 for float64 logits).

    `all` divides by every pixel, ignored ones included (MMSegmentation's default); `valid` by the
    pixels that count. With class weights a pixel counts by the weight of its class, an ignored one
    by 1. Label smoothing as in torch. Without any counted pixel the loss is 0.
    """
    if class_weight is None:
        class_weight = torch.ones(logits.shape[1], device=logits.device)
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    class_weight = class_weight.detach().to(logits.device, real)
    # Imported here: triton is absent from CPU builds of torch.
    if logits.is_cuda:
        from segmill.ops.triton_cross_entropy import UpsampleCrossEntropyCuda as Function
    else:
        Function = UpsampleCrossEntropyCpu
        _check_label(label, logits.shape[1], ignore_index)
    loss, weight = Function.apply(
        logits, label, class_weight, align_corners, ignore_index, label_smoothing
    )
    if average == "all":
        weight = weight + (label == ignore_index).sum()
    return (loss / torch.where(weight > 0, weight, 1)).to(real)


def _check_label(label: Tensor, num_classes: int, ignore_index: int) -> None:
    wrong = (label >= num_classes) & (label != ignore_index)
    if wrong.any():
        raise SegmillError(
            f"The label has the value {int(label[wrong][0])}, but there are {num_classes} classes "
            f"(ignored: {ignore_index}). Map it with data.label_map, or correct data.num_classes."
        )


class UpsampleCrossEntropyCpu(torch.autograd.Function):
    """(sum of the losses, sum of the weights of the counted pixels), both float64."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        class_weight: Tensor,
        align_corners: bool,
        ignore_index: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """Also computes the gradient when somebody will ask for it."""
        _, K, h, w = logits.shape
        _, H, W = label.shape
        real = class_weight.dtype
        rows = interpolation_matrix(h, H, align_corners=align_corners, dtype=real)
        columns = interpolation_matrix(w, W, align_corners=align_corners, dtype=real)
        chunk = max(1, CHUNK // (K * W))
        sums = _Sums(class_weight, ignore_index, label_smoothing, ctx.needs_input_grad[0])
        gradient = torch.zeros_like(logits, dtype=real) if sums.differentiate else None
        with torch.autocast("cpu", enabled=False):
            for index, (output, span, matrix) in itertools.product(
                range(len(logits)), row_chunks(rows, BAND * chunk)
            ):
                band = logits[index, :, span].to(real)
                chunks = row_chunks(matrix, chunk)
                narrow = sums.add_band(band, label[index, output], chunks, columns)
                if gradient is not None and narrow is not None:
                    gradient[index, :, span] += narrow
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        ctx.mark_non_differentiable(sums.weight)
        return sums.loss, sums.weight

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The stored gradient, scaled."""
        scaled = ctx.gradient * gradients[0].to(ctx.gradient.dtype)
        return scaled.to(ctx.dtype), None, None, None, None, None


class _Sums:
    """Losses and weights of the counted pixels, added up piece by piece."""

    def __init__(
        self, class_weight: Tensor, ignore_index: int, label_smoothing: float, differentiate: bool
    ) -> None:
        self.class_weight = class_weight
        self.ignore_index = ignore_index
        self.keep = 1 - label_smoothing
        self.smooth = label_smoothing / len(class_weight)
        self.differentiate = differentiate
        self.loss = torch.zeros((), dtype=torch.float64)
        self.weight = torch.zeros((), dtype=torch.float64)

    def add_band(
        self,
        logits: Float[Tensor, "K h w"],
        label: Tensor,
        chunks: list[RowChunk],
        columns: Float[Tensor, "W w"],
    ) -> Float[Tensor, "K h w"] | None:
        """Add some rows of pixels; the gradient of their loss with respect to the logits."""
        K, h, w = logits.shape
        W = len(columns)
        # Rows first, so that a chunk of rows is one matrix product: (h, K, W).
        wide = (logits.transpose(0, 1).reshape(h * K, w) @ columns.T).reshape(h, K * W)
        gradient = torch.zeros_like(wide) if self.differentiate else None
        for output, span, matrix in chunks:
            z = (matrix @ wide[span]).reshape(-1, K, W)
            self._add_pixels(z, label[output].long())
            if gradient is not None:
                gradient[span] += matrix.T @ z.reshape(-1, K * W)
        if gradient is None:
            return None
        return (gradient.reshape(h * K, W) @ columns).reshape(h, K, w).transpose(0, 1)

    def _add_pixels(self, z: Float[Tensor, "rows K W"], label: Tensor) -> None:
        """Overwrites `z`, upsampled logits, with the gradient."""
        valid = (label != self.ignore_index).to(z.dtype)
        label = torch.where(label == self.ignore_index, 0, label).unsqueeze(1)
        weight = self.class_weight[label[:, 0]] * valid
        hit, smooth = self.keep * weight, self.smooth * valid
        total = hit + smooth * self.class_weight.sum()
        z.sub_(z.amax(1, keepdim=True))
        linear = hit * z.gather(1, label)[:, 0]
        if self.smooth:
            linear = linear + smooth * torch.einsum("k,rkw->rw", self.class_weight, z)
        partition = z.exp_().sum(1)
        self.loss += (total * partition.log() - linear).sum(dtype=torch.float64)
        self.weight += weight.sum(dtype=torch.float64)
        if self.differentiate:
            z.mul_((total / partition).unsqueeze(1))
            if self.smooth:
                z.sub_(smooth.unsqueeze(1) * self.class_weight[:, None])
            z.scatter_add_(1, label, -hit.unsqueeze(1))
