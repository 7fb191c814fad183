"""The six expert operations in plain PyTorch, on any device: what the kernels compute, and where they round.

Products and elementwise functions accumulate in float32 (float64 for float64); z, a, y and all gradients are rounded once, to
the inputs' dtype, when they are stored. Rows behind ``plan.offsets[E]`` are tail: never read, and left as they are in results.
Notation: T tokens, H hidden size, I intermediate size, E experts, R rows, Z = 2I for a gated activation, else I.
"""

import itertools
from collections.abc import Iterator

import torch

from dispatch import DispatchPlan
from routing.linalg import accumulation_dtype, matmul
from sonicmoe.activations import activate, activation_gradient, is_gated


def up_projection(
    x: torch.Tensor,
    w_up: torch.Tensor,
    b_up: torch.Tensor | None,
    plan: DispatchPlan,
    *,
    activation: str,
    gate_up_layout: str,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``z = x[row_to_token] @ w_up[e].T + b_up[e]`` and ``a = act(z)`` for each expert's rows.

    Args:
        x: (T, H).
        w_up: (E, Z, H), its rows laid out as ``gate_up_layout`` says.
        b_up: (E, Z) or None.

    Returns:
        a (R, I), from z before it was rounded, and z (R, Z), laid out like w_up's rows; None unless ``store_z``.
    """
    rows, width = plan.row_to_token.shape[0], w_up.shape[1]
    a = x.new_empty(rows, width // 2 if is_gated(activation) else width)
    z = x.new_empty(rows, width) if store_z else None
    for expert, own in _expert_rows(plan):
        wide_z = matmul(x[plan.row_to_token[own]], w_up[expert].mT)
        if b_up is not None:
            wide_z += b_up[expert]
        if z is not None:
            z[own] = wide_z
        a[own] = activate(wide_z, activation, gate_up_layout)
    return a, z


def down_projection(a: torch.Tensor, w_down: torch.Tensor, b_down: torch.Tensor | None, plan: DispatchPlan) -> torch.Tensor:
    """``y = a @ w_down[e].T + b_down[e]`` for each expert's rows: a (R, I), w_down (E, H, I), b_down (E, H) -> y (R, H)."""
    y = a.new_empty(a.shape[0], w_down.shape[1])
    for expert, own in _expert_rows(plan):
        wide_y = matmul(a[own], w_down[expert].mT)
        if b_down is not None:
            wide_y += b_down[expert]
        y[own] = wide_y
    return y


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
    """Back through score, down-projection and activation, with a recomputed from z.

    With ``da = dout[row_to_token] @ w_down[e]`` and s a row's score: ``dz = s * da * act'(z)``, ``dscore = rowsum(da * a)``
    (plus ``dout . b_down[e]``), so that y is never needed, and ``scaled_a = s * a`` for `down_weight_grad`.

    Args:
        dout: (T, H) gradient of the layer's output.
        z: (R, Z) as stored by `up_projection`.
        w_down: (E, H, I); None is allowed where neither dz nor dscore is needed, and costs no product.
        b_down: (E, H) or None.
        score: (R,) per slot.
        overwrite_z: dz may take z's memory, which is not needed any more.

    Returns:
        dz (R, Z), dscore (R,) per slot in score's dtype, zero for a sentinel, scaled_a (R, I); None for what is not needed.
    """
    rows, wide = z.shape[0], accumulation_dtype(z.dtype)
    dz = (z if overwrite_z else torch.empty_like(z)) if need_dz else None
    row_dscore = score.new_empty(rows) if need_dscore else None
    scaled_a = z.new_empty(rows, z.shape[1] // 2 if is_gated(activation) else z.shape[1]) if need_scaled_a else None
    for expert, own in _expert_rows(plan):
        wide_z = z[own].to(wide, copy=overwrite_z)
        row_score = score[plan.row_to_slot[own]].to(wide).unsqueeze(1)
        if need_dscore or need_scaled_a:
            a = activate(wide_z, activation, gate_up_layout)
        if need_dz or need_dscore:
            own_dout = dout[plan.row_to_token[own]]
            da = matmul(own_dout, w_down[expert])
        if need_dz:
            dz[own] = activation_gradient(wide_z, row_score * da, activation, gate_up_layout)
        if need_dscore:
            row_dscore[own] = (da * a).sum(1).to(score.dtype)
            if b_down is not None:
                row_dscore[own] += own_dout.to(wide) @ b_down[expert].to(wide)
        if need_scaled_a:
            scaled_a[own] = row_score * a
    dscore = torch.where(plan.slot_to_row >= 0, row_dscore[plan.slot_to_row.clamp(min=0)], 0) if need_dscore else None
    return dz, dscore, scaled_a


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
    """``dw_down[e] = dout[row_to_token].T @ scaled_a`` (E, H, I) and ``db_down[e]``, the sum of score * dout (E, H).

    Reduces over each expert's rows; zeros for an expert without rows; None for what is not needed. With ``add_to``, a float32 (E, H, I),
    the weight's gradient is added there, not rounded before, and None is returned in its place.
    """
    experts, wide = plan.num_experts, accumulation_dtype(dout.dtype)
    weight = dout.new_zeros(experts, dout.shape[1], scaled_a.shape[1]) if need_weight and add_to is None else add_to
    bias = dout.new_zeros(experts, dout.shape[1]) if need_bias else None
    for expert, own in _expert_rows(plan):
        own_dout = dout[plan.row_to_token[own]]
        if need_weight:
            gradient = matmul(own_dout.mT, scaled_a[own])
            weight[expert] = gradient if add_to is None else add_to[expert] + gradient
        if need_bias:
            bias[expert] = score[plan.row_to_slot[own]].to(wide) @ own_dout.to(wide)
    return weight if add_to is None else None, bias


def up_weight_grad(
    x: torch.Tensor | None,
    dz: torch.Tensor,
    plan: DispatchPlan,
    *,
    need_weight: bool,
    need_bias: bool,
    add_to: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dw_up[e] = dz.T @ x[row_to_token]`` (E, Z, H) and ``db_up[e]``, the sum of dz (E, Z).

    Reduces over each expert's rows; zeros for an expert without rows; None for what is not needed. With ``add_to``, a float32 (E, Z, H),
    the weight's gradient is added there, not rounded before, and None is returned in its place.
    """
    weight = dz.new_zeros(plan.num_experts, dz.shape[1], x.shape[1]) if need_weight and add_to is None else add_to
    bias = dz.new_zeros(plan.num_experts, dz.shape[1]) if need_bias else None
    for expert, own in _expert_rows(plan):
        if need_weight:
            gradient = matmul(dz[own].mT, x[plan.row_to_token[own]])
            weight[expert] = gradient if add_to is None else add_to[expert] + gradient
        if need_bias:
            bias[expert] = dz[own].sum(0, dtype=accumulation_dtype(dz.dtype))
    return weight if add_to is None else None, bias


def dx_rows(dz: torch.Tensor, w_up: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """``dz @ w_up[e]`` for each expert's rows: dz (R, Z), w_up (E, Z, H) -> (R, H), to be summed by `dispatch.gather_sum`."""
    rows = dz.new_empty(dz.shape[0], w_up.shape[2])
    for expert, own in _expert_rows(plan):
        rows[own] = matmul(dz[own], w_up[expert])
    return rows


def _expert_rows(plan: DispatchPlan) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and which; waits for the device."""
    offsets = plan.offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end > begin:
            yield expert, slice(begin, end)
