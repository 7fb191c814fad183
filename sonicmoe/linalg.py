"""Matrix products that accumulate, and return, in at least float32."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16, float16 and float32; float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) @ (K, N) -> (M, N) in `accumulation_dtype` of the wider operand, never rounded to a narrower one."""
    wide = accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
    if a.is_cuda and a.dtype == b.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)  # the matrix units, without widened copies; PyTorch has it on GPUs only
    return torch.mm(a.to(wide), b.to(wide))
