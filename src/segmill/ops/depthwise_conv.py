"""One square kernel for each channel of a map of tokens, and what usually follows, in one pass.

On CUDA by Triton kernels, which read channels-last maps as they lie; elsewhere torch's operations.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def depthwise_conv(
    tokens: Float[Tensor, "B h w D"],
    weight: Float[Tensor, "D 1 k k"],
    bias: Float[Tensor, " D"],
    *,
    added: Float[Tensor, "B h w D"] | None = None,
    gelu: bool = False,
) -> Float[Tensor, "B h w D"]:
    """The convolution at the size of the map (k is odd) plus `added`, perhaps its exact GELU.

    `added` may be `tokens` itself. Under autocast the result is of autocast's type, unless what is
    added is wider; sums are float32.
    """
    if not _has_kernel(tokens, weight):
        D, size = len(weight), weight.shape[-1]
        feature = tokens.permute(0, 3, 1, 2)
        found = F.conv2d(feature, weight, bias, padding=size // 2, groups=D).permute(0, 2, 3, 1)
        found = found if added is None else found + added
        return F.gelu(found) if gelu else found
    # Imported here: triton is absent from CPU builds of torch.
    from segmill.ops.triton_depthwise_conv import DepthwiseConvCuda

    kind = tokens.dtype
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
    if added is not None:
        kind = torch.promote_types(kind, added.dtype)
    itself = added is tokens
    other = None if itself else added
    return DepthwiseConvCuda.apply(tokens, weight, bias, other, itself, gelu, kind)


def _has_kernel(tokens: Tensor, weight: Tensor) -> bool:
    # Compiled code fuses what surrounds the convolution, and launches fewer kernels without ours.
    if torch.compiler.is_compiling():
        return False
    real = (torch.float32, torch.bfloat16, torch.float16)
    return tokens.is_cuda and tokens.dtype in real and weight.shape[-1] in (3, 5, 7)
