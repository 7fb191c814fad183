"""Matrix products that accumulate, and return, in at least float32."""

import torch

from dispatch.operators import without_autocast
from routing import router_logits_hopper


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16, float16 and float32; float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) @ (K, N) -> (M, N) in `accumulation_dtype` of the wider operand, never rounded to a narrower one."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        # The matrix units, without widened copies. PyTorch (2.13) has mm's out_dtype on GPUs only, without a derivative and without a
        # meta kernel: it is called below autograd and inside an operator.
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
    return torch.mm(a.to(wide), b.to(wide))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T``: x (T, H), weight (E, H) -> (T, E) in `accumulation_dtype` of the wider operand. Autocast does not reach inside.

    On an sm_90 GPU by a kernel of ours where `router_logits_hopper.supports` the operands, else by `matmul`.
    """
    if router_logits_hopper.supports(x, weight):
        return router_logits_hopper.router_logits(x, weight)
    with without_autocast(x.device):
        return matmul(x, weight.mT)


def bfloat16_pair(a: torch.Tensor) -> torch.Tensor:
    """float32 (M, N) -> bfloat16 (M, 2N) whose halves, high and low, add up to each element to 2^-17 of it (bfloat16 alone: 2^-9).

    A product with a pair goes through the matrix units twice, which is many times faster than once in float32. float16 has no such
    pair: its range ends at 6e-8, and a gradient's small elements would be lost.
    """
    high, low = (pair := a.new_empty(a.shape[0], 2 * a.shape[1], dtype=torch.bfloat16)).chunk(2, dim=1)
    high.copy_(a)
    torch.sub(a, high, out=low)
    return pair
