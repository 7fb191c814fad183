"""Host half of kernels/gather_sum.py: checks, the choice of the variant, the launch. Notation: T tokens, H hidden, R rows and slots."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from dispatch.kernels import variants
from dispatch.types import DispatchPlan

_DTYPE_NAME = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def supports(rows: torch.Tensor) -> bool:
    """Whether the kernel computes this: rows in bfloat16, float16 or float32 on an sm_90 GPU, H a multiple of 8."""
    return rows.dtype in _DTYPE_NAME and rows.shape[1] % 8 == 0 and cute_runtime.is_supported_device(rows.device)


def gather_sum_hopper(rows: torch.Tensor, score: torch.Tensor | None, plan: DispatchPlan, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`dispatch.gather_sum`'s forward in one kernel, on the current stream, without autograd.

    Args:
        rows: (R, H) bfloat16, float16 or float32, contiguous, aligned to 16 bytes, H a multiple of 8. Rows of no slot are not read.
        score: (R,) floating point, per slot, or None for weights of one; converted to float32 where :func:`reads` is False.
        plan: the DispatchPlan of the R slots.
        out: (T, H) in rows' dtype, contiguous and aligned likewise, to write to; made if None.

    Returns:
        out. Every element is written; a token without rows gets zeros. float32 accumulation in slot order: the same bits every run.

    Raises:
        TypeError, ValueError: an argument that the kernel cannot take, in one sentence, before any work.
    """
    if rows.dim() != 2 or rows.shape[0] != plan.slot_to_row.shape[0]:
        raise ValueError(f"rows: shape {tuple(rows.shape)}: must be (R, H) with the plan's R={plan.slot_to_row.shape[0]}")
    if score is not None and score.shape != plan.slot_to_row.shape:
        raise ValueError(f"score: shape {tuple(score.shape)}: must be (R,) with the plan's R={plan.slot_to_row.shape[0]}")
    if out is not None and (out.dtype != rows.dtype or out.shape != (plan.num_tokens, rows.shape[1])):
        wanted = (plan.num_tokens, rows.shape[1])
        raise ValueError(f"out: shape {tuple(out.shape)} in {out.dtype}: must be {wanted} in rows' dtype {rows.dtype}")
    if out is None:
        out = rows.new_empty(plan.num_tokens, rows.shape[1])
    return launch(rows, score, plan.slot_to_row, plan.token_offsets, plan.token_slots, plan.slots_per_token, out)


def launch(
    rows: torch.Tensor,
    score: torch.Tensor | None,
    slot_to_row: torch.Tensor,
    token_offsets: torch.Tensor | None,
    token_slots: torch.Tensor | None,
    slots_per_token: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The same on the plan's tensors, whose shapes match already."""
    if rows.dtype not in _DTYPE_NAME:
        raise TypeError(f"rows: dtype {rows.dtype}: must be bfloat16, float16 or float32")
    if rows.shape[1] % 8:
        raise ValueError(f"rows: shape {tuple(rows.shape)}: must be (R, H) with H a multiple of 8")
    uniform = slots_per_token is not None
    if score is not None and not reads(score.dtype, rows.dtype, uniform):
        score = score.float()
    cute_runtime.check_launch(rows=rows, out=out)
    cute_runtime.check_launch(alignment=4, rows=rows, slot_to_row=slot_to_row, token_offsets=token_offsets, token_slots=token_slots)
    cute_runtime.check_launch(alignment=2, rows=rows, score=score)
    if out.numel() == 0:
        return out
    if rows.shape[0] == 0:
        return out.zero_()
    with cute_runtime.on_device(rows.device):
        kernel(rows.dtype, uniform, None if score is None else score.dtype)(
            rows,
            score,
            slot_to_row,
            token_offsets,
            token_slots,
            out,
            slots_per_token if uniform else 0,
            0,
        )
    return out


def reads(score: torch.dtype, rows: torch.dtype, uniform: bool) -> bool:
    """Whether there is a kernel that reads scores of this dtype as they are: float32, and with K slots a token rows' dtype."""
    return score == torch.float32 or (uniform and score == rows)


@functools.cache
def kernel(dtype: torch.dtype, uniform: bool, score: torch.dtype | None) -> Callable[..., None]:
    """The kernel as it is launched: (rows, score | None, slot_to_row, token_offsets | None, token_slots | None, out, K, dependent).

    Args:
        score: its dtype, one that :func:`reads` allows, or None without a score.
    """
    options = {"scored": score is not None} | ({"score": _DTYPE_NAME[score]} if score is not None else {})
    return cute_runtime.load(variants.gather_sum(dtype=_DTYPE_NAME[dtype], form="uniform" if uniform else "csr", **options))
