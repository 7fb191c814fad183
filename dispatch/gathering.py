"""Every token's weighted sum of its rows, and its gradient. Notation: T tokens, H hidden, R rows and slots."""

import torch

from dispatch import gather_sum_hopper
from dispatch.operators import check_backend, differentiable, fake, needs_gradient, operator
from dispatch.types import DispatchPlan

# Elements of the one float32 block that is in flight at a time: it stays in a core's cache on a CPU, fills the machine on a GPU.
_BLOCK_ELEMENTS_CPU = 2**18
_BLOCK_ELEMENTS_GPU = 2**27


def gather_sum(
    rows: torch.Tensor, score: torch.Tensor | None, plan: DispatchPlan, *, backend: str = "auto", any_rows: bool = False
) -> torch.Tensor:
    """Sum each token's rows, weighted by score: ``o[t] = sum over t's slots s of score[s] * rows[slot_to_row[s]]``.

    Args:
        rows: (R, H) floating point, in the plan's row order. The tail and nothing else may hold anything, NaN included.
        score: (R,) floating point, per slot and not per row, or None for weights of one.
        plan: the DispatchPlan of the R slots.
        backend: "hopper" is the kernel (rows contiguous in bfloat16, float16 or float32, H a multiple of 8, an sm_90 GPU), "reference"
            is PyTorch anywhere, "auto" is the kernel where device, dtype and H allow it, else PyTorch. Gradients are PyTorch's.
        any_rows: rows may be (N, H) with any N that holds the rows in use, which nothing checks; not differentiable.

    Returns:
        (T, H) in rows' dtype. Summed in float32 (float64 for float64 rows) in slot order, so the bits depend neither on
        the number of threads nor on the run. A token without rows gets zeros.

    Differentiable in rows and in score: ``drows[r] = score[slot of r] * do[token of r]`` (zero in the tail) and
    ``dscore[s] = <do[token of s], rows[row of s]>`` (zero for a sentinel).

    Raises:
        TypeError, ValueError: wrong ranks, dtypes, sizes or devices, each named.

    Worked example, T=2, K=2, four rows of H=1, every slot routed::

        rows        = [[10], [20], [30], [40]]
        slot_to_row = [2, 0, 1, 3]
        score       = [1, 2, 3, 4]
        o           = [[1 * 30 + 2 * 10], [3 * 20 + 4 * 40]] = [[50], [220]]
    """
    if not _is_sound(rows, score, plan.slot_to_row, any_rows):
        _refuse(rows, score, plan, any_rows)
    check_backend(backend)
    return _gather_sum(
        rows,
        score,
        plan.slot_to_row,
        plan.row_to_slot,
        None if plan.slots_per_token is not None else plan.row_to_token,
        plan.token_offsets,
        plan.token_slots,
        plan.num_tokens,
        plan.slots_per_token,
        backend,
    )


def _is_sound(rows: torch.Tensor, score: torch.Tensor | None, slot_to_row: torch.Tensor, any_rows: bool) -> bool:
    """The conditions of _refuse in one expression: the usual case costs no more than reading its attributes."""
    device, slots = slot_to_row.device, slot_to_row.shape
    return (
        rows.dim() == 2
        and (rows.shape[0] == slots[0] or any_rows)
        and not (any_rows and torch.is_grad_enabled() and needs_gradient((rows, score)))
        and rows.device == device
        and rows.is_floating_point()
        and (score is None or (score.shape == slots and score.device == device and score.is_floating_point()))
    )


def _refuse(rows: torch.Tensor, score: torch.Tensor | None, plan: DispatchPlan, any_rows: bool) -> None:
    slots = plan.slot_to_row.shape[0]
    if not rows.is_floating_point():
        raise TypeError(f"rows: dtype {rows.dtype}: must be a floating-point dtype")
    if rows.dim() != 2 or (rows.shape[0] != slots and not any_rows):
        raise ValueError(f"rows: shape {tuple(rows.shape)}: must be (R, H) with the plan's R={slots}")
    if rows.device != plan.slot_to_row.device:
        raise ValueError(f"rows: device {rows.device}: must be the plan's device {plan.slot_to_row.device}")
    if any_rows and torch.is_grad_enabled() and needs_gradient((rows, score)):
        raise ValueError("any_rows=True: rows and score must need no gradient")
    if score is not None:
        if not score.is_floating_point():
            raise TypeError(f"score: dtype {score.dtype}: must be a floating-point dtype or None")
        if score.shape != (slots,):
            raise ValueError(f"score: shape {tuple(score.shape)}: must be (R,) with the plan's R={slots}")
        if score.device != rows.device:
            raise ValueError(f"score: device {score.device}: must be rows' device {rows.device}")


@operator("sonicmoe_dispatch::gather_sum")
def _gather_sum(
    rows: torch.Tensor,
    score: torch.Tensor | None,
    slot_to_row: torch.Tensor,
    row_to_slot: torch.Tensor,
    row_to_token: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    token_slots: torch.Tensor | None,
    num_tokens: int,
    slots_per_token: int | None,
    backend: str = "auto",
) -> torch.Tensor:
    """The plan's tensors; with slots_per_token only slot_to_row is read, and for a gradient row_to_slot."""
    if backend == "hopper" or (backend == "auto" and gather_sum_hopper.supports(rows)):
        out = rows.new_empty(num_tokens, rows.shape[1])
        return gather_sum_hopper.launch(rows, score, slot_to_row, token_offsets, token_slots, slots_per_token, out)
    return _gather_sum_torch(rows, score, slot_to_row, row_to_token, token_slots, num_tokens, slots_per_token)


@fake(_gather_sum)
def _(
    rows: torch.Tensor,
    score: torch.Tensor | None,
    slot_to_row: torch.Tensor,
    row_to_slot: torch.Tensor,
    row_to_token: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    token_slots: torch.Tensor | None,
    num_tokens: int,
    slots_per_token: int | None,
    backend: str = "auto",
) -> torch.Tensor:
    return rows.new_empty(num_tokens, rows.shape[1])


def _gather_sum_torch(
    rows: torch.Tensor,
    score: torch.Tensor | None,
    slot_to_row: torch.Tensor,
    row_to_token: torch.Tensor | None,
    token_slots: torch.Tensor | None,
    num_tokens: int,
    slots_per_token: int | None,
) -> torch.Tensor:
    out = torch.zeros(num_tokens, rows.shape[1], dtype=_sum_dtype(rows), device=rows.device)
    if num_tokens == 0 or rows.shape[0] == 0:
        return out.to(rows.dtype)
    for begin, end in _blocks(slot_to_row.shape[0], rows):
        slot = torch.arange(begin, end, device=rows.device) if token_slots is None else token_slots[begin:end]
        row = slot_to_row[slot]
        routed = row >= 0
        row = row.clamp(min=0)
        term = _weighted(rows, row, None if score is None else score[slot], routed)
        token = slot // slots_per_token if token_slots is None else row_to_token[row].clamp(min=0).long()
        if rows.is_cuda:
            # index_add_ adds with atomics there, in any order; this sorts by token, stably, and adds in that order.
            out.index_put_((token,), term, accumulate=True)
        else:
            out.index_add_(0, token, term)
    return out.to(rows.dtype)


@operator("sonicmoe_dispatch::gather_sum_rows_grad")
def _rows_grad(out_grad: torch.Tensor, score: torch.Tensor | None, row_to_slot: torch.Tensor, row_to_token: torch.Tensor) -> torch.Tensor:
    grad = out_grad.new_empty(row_to_slot.shape[0], out_grad.shape[1])
    if out_grad.shape[0] == 0:
        return grad.zero_()
    for begin, end in _blocks(grad.shape[0], grad):
        token = row_to_token[begin:end]
        weight = None if score is None else score[row_to_slot[begin:end].clamp(min=0)]
        grad[begin:end] = _weighted(out_grad, token.clamp(min=0), weight, token >= 0)
    return grad


@fake(_rows_grad)
def _(out_grad: torch.Tensor, score: torch.Tensor | None, row_to_slot: torch.Tensor, row_to_token: torch.Tensor) -> torch.Tensor:
    return out_grad.new_empty(row_to_slot.shape[0], out_grad.shape[1])


@operator("sonicmoe_dispatch::gather_sum_score_grad")
def _score_grad(
    out_grad: torch.Tensor, rows: torch.Tensor, slot_to_row: torch.Tensor, row_to_token: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    grad = torch.zeros(slot_to_row.shape[0], dtype=dtype, device=rows.device)
    if out_grad.shape[0] == 0:
        return grad
    for begin, end in _blocks(grad.shape[0], rows):
        row = slot_to_row[begin:end]
        routed = row >= 0
        row = row.clamp(min=0)
        term = _weighted(rows, row, None, routed)
        grad[begin:end] = term.mul_(out_grad[row_to_token[row].clamp(min=0)]).sum(1)
    return grad


@fake(_score_grad)
def _(
    out_grad: torch.Tensor, rows: torch.Tensor, slot_to_row: torch.Tensor, row_to_token: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return rows.new_empty(slot_to_row.shape[0], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    rows, score, slot_to_row, row_to_slot, row_to_token, *_, ctx.slots_per_token, _ = inputs
    rows_needed, score_needed, *_ = ctx.needs_input_grad
    ctx.save_for_backward(rows if score_needed else None, score if rows_needed else None, slot_to_row, row_to_slot, row_to_token)
    ctx.score_dtype = None if score is None else score.dtype


def _backward(ctx, out_grad: torch.Tensor):
    rows, score, slot_to_row, row_to_slot, row_to_token = ctx.saved_tensors
    rows_needed, score_needed, *_ = ctx.needs_input_grad
    if row_to_token is None:
        row_to_token = row_to_slot // ctx.slots_per_token
    rows_grad = _rows_grad(out_grad, score, row_to_slot, row_to_token) if rows_needed else None
    score_grad = _score_grad(out_grad, rows, slot_to_row, row_to_token, ctx.score_dtype) if score_needed else None
    return rows_grad, score_grad, *(None,) * 8


differentiable(_gather_sum, _backward, _setup_context)


def _sum_dtype(rows: torch.Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _blocks(count: int, rows: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges that cover [0, count) and whose rows' worth of float32 is one block."""
    elements = _BLOCK_ELEMENTS_GPU if rows.is_cuda else _BLOCK_ELEMENTS_CPU
    step = max(1, elements // max(1, rows.shape[1]))
    return [(begin, min(begin + step, count)) for begin in range(0, count, step)]


def _weighted(rows: torch.Tensor, index: torch.Tensor, weight: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """(n, H): ``weight * rows[index]`` in the sum's dtype, zeros where not ``valid``, whatever rows holds there."""
    term = rows.index_select(0, index).to(_sum_dtype(rows))
    if weight is not None:
        term = term * weight.to(term.dtype).unsqueeze(1)
    return term.masked_fill_(~valid.unsqueeze(1), 0)
