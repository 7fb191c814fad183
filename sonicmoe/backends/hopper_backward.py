"""The backward's expert operations in kernels of our own: host half of `sonicmoe.kernels`' activation_backward, score_grad,
weight_grad, bias_grad and dx_rows.

Without host synchronisation, on the current stream, and deterministic.
Notation: T tokens, H hidden size, I intermediate size, E experts, R rows, Z = 2I for a gated activation, else I.
"""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from cute_runtime import Variant
from dispatch import DispatchPlan
from sonicmoe.activations import activate, is_gated
from sonicmoe.backends.arguments import (
    DTYPES,
    as_stored,
    blocks,
    check_gathered,
    check_gradient_reach,
    check_matrices,
    check_reach,
    fast_memory,
    tickets,
)
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import activation_backward_tile, dx_tile, weight_grad_tile


def activation_backward(
    dout: torch.Tensor,
    z: torch.Tensor,
    w_down: torch.Tensor | None,
    b_down: torch.Tensor | None,
    score: torch.Tensor,
    plan: DispatchPlan,
    *,
    activation: str,
    gate_up_layout: str,
    need_dz: bool,
    need_dscore: bool,
    need_scaled_a: bool,
    overwrite_z: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `sonicmoe.backends.reference.activation_backward`; rows behind ``plan.offsets[E]`` of dz and scaled_a stay unwritten.

    Args:
        dout: (T, H) bfloat16 or float16, H a multiple of 8, contiguous and aligned to 16 bytes like every tensor here.
        z: (R, Z), dout's dtype.
        w_down: (E, H, I), dout's dtype; either of its last two dimensions may be the contiguous one.
        b_down: (E, H) or None.
        score: (R,) per slot, floating point.
        overwrite_z: dz may take z's memory, which is not needed any more.

    Raises:
        TypeError, ValueError: a tensor that the kernels cannot take as they are, in one sentence, before any work.
    """
    rows, width = z.shape
    columns = width // 2 if is_gated(activation) else width
    weights = score.float()
    if not (need_dz or need_dscore):
        scaled_a = weights[plan.row_to_slot].unsqueeze(1) * activate(z.float(), activation, gate_up_layout) if need_scaled_a else None
        return None, None, None if scaled_a is None else scaled_a.to(z.dtype)
    stored, transposed = as_stored("w_down", w_down)
    check_matrices(dout=dout, z=z, w_down=stored, b_down=b_down)
    check_gathered(dout=dout)
    check_reach(rows, w_down=w_down.shape[1] * w_down.shape[2])
    cute_runtime.check_launch(
        alignment=4, dout=dout, score=weights, offsets=plan.offsets, row_to_token=plan.row_to_token, row_to_slot=plan.row_to_slot
    )
    dz = (z if overwrite_z else torch.empty_like(z)) if need_dz else None
    scaled_a = z.new_empty(rows, columns) if need_scaled_a else None
    partial = weights.new_empty(partial_lines(rows, w_down.shape[0], columns, dout.device), rows) if need_dscore else None
    dscore = torch.empty_like(weights) if need_dscore else None
    if rows == 0:
        return dz, None if dscore is None else dscore.to(score.dtype), scaled_a
    wanted = {"dz": need_dz, "dscore": need_dscore, "scaled_a": need_scaled_a}
    kinds = (dout.dtype, dout.device, activation, gate_up_layout)
    kernel = activation_backward_kernel(rows, w_down.shape[0], *kinds, transposed=transposed, **wanted)
    with cute_runtime.on_device(dout.device):
        kernel(
            dout,
            stored,
            z,
            weights,
            plan.offsets,
            tickets(plan),
            plan.row_to_token,
            plan.row_to_slot,
            dz,
            scaled_a,
            partial,
            blocks(dout.device),
        )
        if need_dscore:
            bias = b_down is not None
            bias_arguments = (dout, b_down, plan.offsets, plan.row_to_token) if bias else (None, None, None, None)
            score_grad_kernel(dout.dtype, bias)(partial, plan.slot_to_row, *bias_arguments, dscore)
    return dz, None if dscore is None else dscore.to(score.dtype), scaled_a


def down_weight_grad(
    dout: torch.Tensor,
    scaled_a: torch.Tensor | None,
    score: torch.Tensor,
    plan: DispatchPlan,
    *,
    need_weight: bool,
    need_bias: bool,
    add_to: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `sonicmoe.backends.reference.down_weight_grad`: dout (T, H), scaled_a (R, I) -> dw_down (E, H, I), db_down (E, H)."""
    weight = _weight_grad(dout, scaled_a, plan, transposed=False, add_to=add_to) if need_weight else None
    bias = _bias_grad(dout, plan, score.float()) if need_bias else None
    return weight, bias


def up_weight_grad(
    x: torch.Tensor | None,
    dz: torch.Tensor,
    plan: DispatchPlan,
    *,
    need_weight: bool,
    need_bias: bool,
    add_to: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `sonicmoe.backends.reference.up_weight_grad`: x (T, H), dz (R, Z) -> dw_up (E, Z, H), db_up (E, Z)."""
    weight = _weight_grad(x, dz, plan, transposed=True, add_to=add_to) if need_weight else None
    bias = _bias_grad(dz, plan, None) if need_bias else None
    return weight, bias


def dx_rows(dz: torch.Tensor, w_up: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """As `sonicmoe.backends.reference.dx_rows`: dz (R, Z), w_up (E, Z, H) -> (R, H); rows behind ``plan.offsets[E]`` stay unwritten."""
    stored, transposed = as_stored("w_up", w_up)
    check_matrices(dz=dz, w_up=stored)
    cute_runtime.check_launch(alignment=4, dz=dz, offsets=plan.offsets)
    rows = dz.shape[0]
    check_reach(rows, w_up=w_up.shape[1] * w_up.shape[2])
    out = dz.new_empty(rows, w_up.shape[2])
    if rows == 0:
        return out
    kernel = dx_rows_kernel(rows, w_up.shape[0], dz.dtype, dz.device, transposed)
    with cute_runtime.on_device(dz.device):
        kernel(dz, stored, plan.offsets, tickets(plan), out, blocks(dz.device))
    return out


def _weight_grad(
    tokens: torch.Tensor, rows: torch.Tensor, plan: DispatchPlan, *, transposed: bool, add_to: torch.Tensor | None
) -> torch.Tensor | None:
    """(E, M, N) of tokens (T, M) and rows (R, N), or (E, N, M) if ``transposed``; None where it was added to ``add_to``."""
    check_matrices(tokens=tokens, rows=rows)
    check_gathered(tokens=tokens)
    cute_runtime.check_launch(tokens=tokens, add_to=add_to)
    cute_runtime.check_launch(alignment=4, tokens=tokens, offsets=plan.offsets, row_to_token=plan.row_to_token)
    width, columns = tokens.shape[1], rows.shape[1]
    shape = (plan.num_experts, *((columns, width) if transposed else (width, columns)))
    check_gradient_reach(rows.shape[0], "dw_up" if transposed else "dw_down", *shape[:2])
    if add_to is not None and (add_to.dtype != torch.float32 or add_to.shape != shape):
        raise ValueError(f"add_to: shape {tuple(add_to.shape)} in {add_to.dtype}: must be {shape} in torch.float32")
    if rows.shape[0] == 0:
        return tokens.new_zeros(shape) if add_to is None else None
    out = tokens.new_empty(shape) if add_to is None else add_to
    kernel = weight_grad_kernel(tokens.dtype, transposed, add_to is not None)
    with cute_runtime.on_device(tokens.device):
        kernel(tokens, rows, plan.offsets, tickets(plan), plan.row_to_token, out, blocks(tokens.device))
    return out if add_to is None else None


def _bias_grad(rows: torch.Tensor, plan: DispatchPlan, score: torch.Tensor | None) -> torch.Tensor:
    """(E, W): the experts' sums of rows (R, W), or of score times the tokens' rows (T, W)."""
    check_matrices(rows=rows)
    out = rows.new_empty(plan.num_experts, rows.shape[1])
    if plan.row_to_token.shape[0] == 0:
        return out.zero_()
    gathered = score is not None
    indices = (plan.row_to_token, plan.row_to_slot, score) if gathered else (None, None, None)
    with cute_runtime.on_device(rows.device):
        bias_grad_kernel(rows.dtype, gathered)(rows, plan.offsets, *indices, out)
    return out


def activation_backward_kernel(
    rows: int,
    experts: int,
    dtype: torch.dtype,
    device: torch.device,
    activation: str,
    gate_up_layout: str,
    *,
    transposed: bool = False,
    **wanted: bool,
) -> Callable[..., None]:
    """(dout, w_down, z, score, offsets, tickets, row_to_token, row_to_slot, dz | None, scaled_a | None, partial | None, blocks), where
    partial has a line for each of the tile's columns and ``wanted`` is dz, dscore, scaled_a."""
    interleaved = is_gated(activation) and gate_up_layout == "interleaved"
    tile = activation_backward_tile(rows=rows, experts=experts, fast_memory=fast_memory(device))
    options = {"dtype": DTYPES[dtype], "activation": activation, "interleaved": interleaved, "transposed": transposed}
    return _kernel(variants.activation_backward(tile=tile, **options, **wanted))


def partial_lines(rows: int, experts: int, columns: int, device: torch.device) -> int:
    """Lines of activation_backward's partial sums for I=columns."""
    return -(-columns // activation_backward_tile(rows=rows, experts=experts, fast_memory=fast_memory(device)).n)


def score_grad_kernel(dtype: torch.dtype, bias: bool) -> Callable[..., None]:
    """(partial, slot_to_row, then with ``bias`` dout, b_down, offsets, row_to_token, else four None, dscore)."""
    return _kernel(variants.score_grad(dtype=DTYPES[dtype], bias=bias))


def weight_grad_kernel(dtype: torch.dtype, transposed: bool, add: bool = False) -> Callable[..., None]:
    """(tokens, rows, offsets, tickets, row_to_token, out, blocks), ``transposed`` for dw_up."""
    return _kernel(variants.weight_grad(tile=weight_grad_tile(), dtype=DTYPES[dtype], transposed=transposed, add=add))


def bias_grad_kernel(dtype: torch.dtype, gathered: bool) -> Callable[..., None]:
    """(rows, offsets, then for db_down, ``gathered``, row_to_token, row_to_slot, score, else three None, out)."""
    return _kernel(variants.bias_grad(dtype=DTYPES[dtype], gathered=gathered))


def dx_rows_kernel(rows: int, experts: int, dtype: torch.dtype, device: torch.device, transposed: bool = False) -> Callable[..., None]:
    """(dz, w_up, offsets, tickets, out, blocks)."""
    tile = dx_tile(rows=rows, experts=experts, fast_memory=fast_memory(device))
    return _kernel(variants.dx_rows(tile=tile, dtype=DTYPES[dtype], transposed=transposed))


@functools.cache
def _kernel(variant: Variant) -> Callable[..., None]:
    return cute_runtime.load(variant)
