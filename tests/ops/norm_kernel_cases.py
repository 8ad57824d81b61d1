"""What the kernels of modulated_norm must agree with, in float64.

    python tests/ops/norm_kernel_cases.py [compiled]

Interpreted on the CPU with TRITON_INTERPRET=1; `compiled` needs a GPU.
"""

import sys

import torch
from torch import Tensor

from segmill.ops.modulated_norm import modulated_norm
from segmill.ops.triton_modulated_norm import ModulatedNormCuda


def case(size: tuple[int, int, int], *, added: bool, kind: torch.dtype) -> dict[str, Tensor]:
    """Tokens far from zero; shift, scale and gate are parts of one tensor, as after one product."""
    N, T, D = size
    draw = torch.Generator().manual_seed(0)

    def normal(*extent: int) -> Tensor:
        return torch.randn(*extent, generator=draw)

    shift, scale, gate = normal(N, 1, 3 * D).to(kind).chunk(3, dim=2)
    given = {"tokens": 3.0 + 2.0 * normal(N, T, D), "shift": shift, "scale": scale}
    return given | ({"branch": normal(N, T, D).to(kind), "gate": gate} if added else {})


def by_kernels(given: dict[str, Tensor], kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Wherever the tensors are."""
    names = ("tokens", "shift", "scale", "branch", "gate")
    return ModulatedNormCuda.apply(*(given.get(name) for name in names), kind)


def check_modulated_norm(
    size: tuple[int, int, int], *, added: bool, kind: torch.dtype, device: str
) -> None:
    """Both results and all gradients; `kind` is that of all but the tokens, which are float32."""
    given = {name: each.to(device) for name, each in case(size, added=added, kind=kind).items()}
    ours = {name: each.detach().requires_grad_() for name, each in given.items()}
    exact = {name: each.detach().double().requires_grad_() for name, each in given.items()}
    found, expected = by_kernels(ours, kind), modulated_norm(**exact)
    assert [each.dtype for each in found] == [torch.float32, kind]
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(size, generator=draw).to(device, each.dtype) for each in found]
    gradients = torch.autograd.grad(found, [*ours.values()], upstream)
    wide = [each.double() for each in upstream]
    wanted = torch.autograd.grad(expected, [*exact.values()], wide)
    # Sums of float32; one rounding to the result's type, which the interpreter cuts off.
    roundings = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    pairs = zip((*found, *gradients), (*expected, *wanted), strict=True)
    for index, (result, reference) in enumerate(pairs):
        error = (result.double() - reference).abs().max() / reference.abs().max()
        assert error < roundings[result.dtype], f"{index}: {error}"


def check_all_small() -> None:
    """Every branch: channels that are no power of two, tokens that fill no program."""
    for size, added, kind in (
        ((2, 21, 72), True, torch.float32),
        ((2, 21, 72), False, torch.float32),
        ((1, 16, 64), True, torch.bfloat16),
        ((3, 5, 40), False, torch.float16),
        ((1, 1, 8), True, torch.float32),
    ):
        check_modulated_norm(size, added=added, kind=kind, device="cpu")


def check_compiled() -> None:
    """torch.compile takes the kernels into one graph, and finds what they find; a GPU."""
    for added in (False, True):
        given = case((2, 33, 144), added=added, kind=torch.bfloat16)
        ours = {name: each.detach().cuda().requires_grad_() for name, each in given.items()}
        eager = modulated_norm(**ours)
        compiled = torch.compile(modulated_norm, fullgraph=True)(**ours)
        # The same kernels on the same data.
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
        upstream = [torch.randn_like(each) for each in eager]
        gradients = [
            torch.autograd.grad(each, [*ours.values()], upstream) for each in (compiled, eager)
        ]
        # Sums over programs may be of another order, and then are rounded to bfloat16.
        torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


if __name__ == "__main__":
    check_compiled() if sys.argv[1:] == ["compiled"] else check_all_small()
