"""The expert operations on an sm_90 GPU: host half of kernels/up_projection.py and kernels/down_projection.py; the backward's are in
hopper_backward.py.

All run in this project's kernels, without host synchronisation, on the current stream.
Notation: T tokens, H hidden size, I intermediate size, E experts, R rows, Z = 2I for a gated activation, else I.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import cute_runtime
from dispatch import DispatchPlan, debug, gather_sum_hopper, plan_hopper
from sonicmoe.activations import is_gated
from sonicmoe.backends.arguments import (
    DTYPES,
    MOST_GATHERED,
    as_stored,
    blocks,
    check_gathered,
    check_matrices,
    check_reach,
    fast_memory,
    tickets,
)
from sonicmoe.backends.hopper_backward import activation_backward, down_weight_grad, dx_rows, up_weight_grad
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import down_tile, up_tile

__all__ = ["activation_backward", "down_projection", "down_weight_grad", "dx_rows", "forward", "up_projection", "up_weight_grad"]


def forward(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    b_up: torch.Tensor | None,
    b_down: torch.Tensor | None,
    score: torch.Tensor,
    token_index: torch.Tensor | None,
    expert_index: torch.Tensor,
    slots_per_token: int | None,
    activation: str,
    gate_up_layout: str,
    store_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """o (T, H), the packed plan and z (R, Z): plan, both projections and gather_sum in a row, the same launches in the same order.

    What the operations check, choose and bind one by one is done here once for each configuration, so that a forward costs the host
    little more than its launches and allocations. None for what is unusual: the operations do it one by one.

    Args:
        as of `sonicmoe.routed_experts`, checked by it.

    Raises:
        ValueError: a tensor that the kernels cannot take as it is, in one sentence, before any work.
    """
    # as_stored asks the same first; here the usual case costs no call.
    stored_up, up_transposed = (w_up, False) if w_up.is_contiguous() else as_stored("w_up", w_up)
    stored_down, down_transposed = (w_down, False) if w_down.is_contiguous() else as_stored("w_down", w_down)
    pointers = x.data_ptr() | w_up.data_ptr() | w_down.data_ptr()
    contiguous = x.is_contiguous()
    for bias in (b_up, b_down):
        if bias is not None:
            pointers |= bias.data_ptr()
            contiguous = contiguous and bias.is_contiguous()
    if pointers % 16 or not contiguous:
        check_matrices(x=x, w_up=stored_up, w_down=stored_down, b_up=b_up, b_down=b_down)
    device, slots = x.device, expert_index.shape[0]
    if score.dtype != torch.float32 and not gather_sum_hopper.reads(score.dtype, x.dtype, slots_per_token is not None):
        score = score.float()
    launch = _forward_launch(
        *(x.shape, w_up.shape, slots, slots_per_token, x.dtype, expert_index.dtype, score.dtype, device),
        *(activation, gate_up_layout, store_z, b_up is not None, b_down is not None, up_transposed, down_transposed),
    )
    if launch is None or debug.enabled():
        return None
    score, expert_index = score.contiguous(), expert_index.contiguous()
    with cute_runtime.on_device(device):
        if launch.plan is not None:
            packed, plan = launch.plan(expert_index)
        else:
            packed, plan = plan_hopper.launch(token_index, expert_index, x.shape[0], w_up.shape[0], slots_per_token)
        a = x.new_empty(*launch.a)  # numbers, not a tuple: half a microsecond less
        z = x.new_empty(*launch.z) if store_z else None
        launch.up(x, stored_up, b_up, plan.offsets, plan.tickets, plan.row_to_token, a, z, launch.blocks)
        y = x.new_empty(*launch.y)
        # The last two start while the launch before drains: nothing but an allocation's fill comes between.
        launch.down(a, stored_down, b_down, plan.offsets, plan.tickets, y, launch.blocks, 1)
        out = torch.empty_like(x)
        if slots_per_token is not None:
            launch.gather_sum(y, score, plan.slot_to_row, None, None, out, slots_per_token, 1)
        else:
            launch.gather_sum(y, score, plan.slot_to_row, plan.token_offsets, plan.token_slots, out, 0, 1)
    return out, packed, z


class ForwardLaunch(NamedTuple):
    """The kernels of one configuration of `forward` and the shapes of what they write."""

    plan: plan_hopper.UniformLaunch | None
    up: Callable[..., None]
    down: Callable[..., None]
    gather_sum: Callable[..., None]
    a: tuple[int, int]
    z: tuple[int, int]
    y: tuple[int, int]
    blocks: int


@functools.lru_cache(maxsize=1024)
def _forward_launch(
    x: torch.Size,
    w_up: torch.Size,
    slots: int,
    slots_per_token: int | None,
    dtype: torch.dtype,
    index: torch.dtype,
    score: torch.dtype,
    device: torch.device,
    activation: str,
    gate_up_layout: str,
    store_z: bool,
    up_bias: bool,
    down_bias: bool,
    up_transposed: bool,
    down_transposed: bool,
) -> ForwardLaunch | None:
    """None where there is nothing to compute. Raises ValueError where an index of a kernel would overflow."""
    (tokens, hidden), (experts, width, _) = x, w_up
    if tokens * hidden > MOST_GATHERED:
        raise ValueError(f"x: {tokens * hidden} elements: must be at most {MOST_GATHERED}")
    if not slots or not tokens:
        return None
    uniform = slots_per_token is not None
    up, reduced = _up_launch(slots, width, experts, hidden, dtype, activation, gate_up_layout, store_z, up_bias, up_transposed, device)
    return ForwardLaunch(
        plan_hopper.uniform_launch(tokens, experts, slots_per_token, index, device) if uniform and experts < plan_hopper.MAX_BINS else None,
        up,
        _down_launch(slots, experts, hidden, reduced, dtype, down_bias, down_transposed, device),
        gather_sum_hopper.kernel(dtype, uniform, score),
        (slots, reduced),
        (slots, width),
        (slots, hidden),
        blocks(device),
    )


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
    """a (R, I) and z (R, Z) as `sonicmoe.backends.reference.up_projection`; the tail behind ``plan.offsets[E]`` stays unwritten.

    Args:
        x: (T, H) bfloat16 or float16, H a multiple of 8, contiguous and aligned to 16 bytes like every tensor here.
        w_up: (E, Z, H), x's dtype; either of its last two dimensions may be the contiguous one.
        b_up: (E, Z) or None.

    Raises:
        TypeError, ValueError: a tensor that the kernel cannot take as it is, in one sentence, before any work.
    """
    rows, width, experts = plan.row_to_token.shape[0], w_up.shape[1], w_up.shape[0]
    stored, transposed = as_stored("w_up", w_up)
    check_matrices(x=x, w_up=stored, b_up=b_up)
    check_gathered(x=x)
    cute_runtime.check_launch(alignment=4, x=x, offsets=plan.offsets, row_to_token=plan.row_to_token)
    kernel, a_width = _up_launch(
        rows, width, experts, x.shape[1], x.dtype, activation, gate_up_layout, store_z, b_up is not None, transposed, x.device
    )
    a = x.new_empty(rows, a_width)
    z = x.new_empty(rows, width) if store_z else None
    if kernel is not None:
        device = x.device
        with cute_runtime.on_device(device):
            kernel(x, stored, b_up, plan.offsets, tickets(plan), plan.row_to_token, a, z, blocks(device))
    return a, z


def down_projection(a: torch.Tensor, w_down: torch.Tensor, b_down: torch.Tensor | None, plan: DispatchPlan) -> torch.Tensor:
    """y (R, H) as `sonicmoe.backends.reference.down_projection`; the tail behind ``plan.offsets[E]`` stays unwritten.

    Args:
        a: (R, I) bfloat16 or float16, I a multiple of 8, contiguous and aligned to 16 bytes like every tensor here.
        w_down: (E, H, I), a's dtype; either of its last two dimensions may be the contiguous one.
        b_down: (E, H) or None.

    Raises:
        TypeError, ValueError: a tensor that the kernel cannot take as it is, in one sentence, before any work.
    """
    rows, reduced = a.shape
    experts, hidden, _ = w_down.shape
    stored, transposed = as_stored("w_down", w_down)
    check_matrices(a=a, w_down=stored, b_down=b_down)
    cute_runtime.check_launch(alignment=4, a=a, offsets=plan.offsets)
    y = a.new_empty(rows, hidden)
    kernel = _down_launch(rows, experts, hidden, reduced, a.dtype, b_down is not None, transposed, a.device)
    if kernel is not None:
        device = a.device
        with cute_runtime.on_device(device):
            kernel(a, stored, b_down, plan.offsets, tickets(plan), y, blocks(device), 0)
    return y


@functools.lru_cache(maxsize=1024)
def _up_launch(
    rows: int,
    width: int,
    experts: int,
    hidden: int,
    dtype: torch.dtype,
    activation: str,
    gate_up_layout: str,
    store_z: bool,
    bias: bool,
    transposed: bool,
    device: torch.device,
) -> tuple[Callable[..., None] | None, int]:
    """The kernel for these sizes, None where there is nothing to compute, and the columns of a."""
    gated = is_gated(activation)
    columns = width // 2 if gated else width
    if rows == 0:
        return None, columns
    check_reach(rows, w_up=width * hidden)
    layout = {"interleaved": gated and gate_up_layout == "interleaved", "transposed": transposed}
    tile = up_tile(rows=rows, experts=experts, store_z=store_z, fast_memory=fast_memory(device), halves=variants.up_halves(**layout))
    variant = variants.up_projection(tile=tile, dtype=DTYPES[dtype], activation=activation, **layout, store_z=store_z, bias=bias)
    return cute_runtime.load(variant), columns


@functools.lru_cache(maxsize=1024)
def _down_launch(
    rows: int, experts: int, hidden: int, reduced: int, dtype: torch.dtype, bias: bool, transposed: bool, device: torch.device
) -> Callable[..., None] | None:
    """The kernel for these sizes, None where there is nothing to compute."""
    if rows == 0:
        return None
    check_reach(rows, w_down=hidden * reduced)
    tile = down_tile(rows=rows, experts=experts, reduced=reduced, fast_memory=fast_memory(device))
    return cute_runtime.load(variants.down_projection(tile=tile, dtype=DTYPES[dtype], bias=bias, transposed=transposed))
