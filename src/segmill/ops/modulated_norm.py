"""Layer normalisation that a condition scales and shifts (adaLN), with the residual before it.

On CUDA by Triton kernels, one forward and one backward; elsewhere torch's operations.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6


def modulated_norm(
    tokens: Float[Tensor, "N T D"],
    shift: Float[Tensor, "N 1 D"],
    scale: Float[Tensor, "N 1 D"],
    *,
    branch: Float[Tensor, "N T D"] | None = None,
    gate: Float[Tensor, "N 1 D"] | None = None,
) -> tuple[Float[Tensor, "N T D"], Float[Tensor, "N T D"]]:
    """`tokens + gate * branch`, and its layer norm times `1 + scale` plus `shift`.

    Without `branch` the first result is the tokens. Under autocast the second is of autocast's
    type, as what follows it is a product of matrices; inside all is float32.
    """
    if (branch is None) != (gate is None):
        raise ValueError("modulated_norm needs both branch and gate, or neither.")
    if not _has_kernel(tokens, shift, scale, branch, gate):
        if branch is not None and gate is not None:
            tokens = tokens + gate * branch
        normal = F.layer_norm(tokens, tokens.shape[2:], eps=EPS)
        return tokens, normal * (1 + scale) + shift
    # Imported here: triton is absent from CPU builds of torch.
    from segmill.ops.triton_modulated_norm import ModulatedNormCuda

    kind = tokens.dtype
    if torch.is_autocast_enabled("cuda"):
        kind = torch.get_autocast_dtype("cuda")
    return ModulatedNormCuda.apply(tokens, shift, scale, branch, gate, kind)


def _has_kernel(tokens: Tensor, *others: Tensor | None) -> bool:
    real = (torch.float32, torch.bfloat16, torch.float16)
    given = [each for each in (tokens, *others) if each is not None]
    return tokens.is_cuda and all(each.dtype in real for each in given)
