"""The dispatch plan: from the routing's slots to the experts' rows. Notation: T tokens, E experts, R slots."""

import torch

from dispatch import debug, plan_hopper
from dispatch.counting import ID_DTYPES, INT32_MAX, SIZE_TYPES, bucket, check_ids, check_size, histogram
from dispatch.kernels.sizes import TICKETS
from dispatch.operators import check_backend, fake, is_direct, operator
from dispatch.types import DispatchPlan, pack, packed_size, unpack


def plan(
    token_index: torch.Tensor | None,
    expert_index: torch.Tensor,
    *,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None = None,
    backend: str = "auto",
) -> DispatchPlan:
    """Give every slot its row: experts in order, within an expert ascending by token, within a token by slot.

    Args:
        token_index: (R,) int32 or int64, or None where slots_per_token says it all.
        expert_index: (R,) int32 or int64, without token_index also (T, K), as a router has them. Ids outside [0, E) are sentinels and
            get no row.
        num_tokens: T >= 0.
        num_experts: E >= 1.
        slots_per_token: K if slot ``t * K + j`` belongs to token t, which saves a sort; else None.
        backend: "hopper" is the kernels (an sm_90 GPU), "reference" is PyTorch anywhere, "auto" is the kernels where the device and the
            sizes (up to 2**30) allow them, else PyTorch. The bits are the same.

    Returns:
        A DispatchPlan; types.py describes its fields and has the worked example of six slots. Nothing waits for the
        device and every shape follows from the arguments' shapes.

    A slot whose token is outside [0, T) gets no row either, so that no index of the plan can be out of range. Under the debug
    switch a slot with a valid expert and such a token is an error, as is a token_index that contradicts slots_per_token.

    Raises:
        TypeError, ValueError: wrong ranks, dtypes, sizes or devices, each named.

    Worked example, T=2, E=2, four slots in no order, 9 is a sentinel::

        token_index   = [1, 0, 1, 0]
        expert_index  = [0, 0, 9, 1]
        offsets       = [0, 2, 3]
        row_to_slot   = [1, 0, 3, -1]     row_to_token = [0, 1, 0, -1]     slot_to_row = [1, 0, -1, 2]
        token_offsets = [0, 2, 3]         token_slots  = [1, 3, 0, 2]      (slot 2 lies behind token_offsets[T])
    """
    if not _is_sound(token_index, expert_index, num_tokens, num_experts, slots_per_token):
        _refuse(token_index, expert_index, num_tokens, num_experts, slots_per_token)
    check_backend(backend)
    if expert_index.dim() == 2:
        expert_index = expert_index.reshape(-1)
    if is_direct((expert_index, token_index)):
        return _make(token_index, expert_index, num_tokens, num_experts, slots_per_token, backend)[1]
    packed = _plan(expert_index, token_index, num_tokens, num_experts, slots_per_token, backend)
    return unpack(packed, expert_index.shape[0], num_tokens, num_experts, slots_per_token)


def _is_sound(
    token_index: torch.Tensor | None, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> bool:
    """The conditions of _refuse in one expression: the usual case costs no more than reading its attributes."""
    shape = expert_index.shape
    if not (isinstance(num_tokens, SIZE_TYPES) and isinstance(num_experts, SIZE_TYPES)):
        return False
    if expert_index.dtype not in ID_DTYPES or not (0 <= num_tokens < INT32_MAX and 1 <= num_experts < INT32_MAX):
        return False
    if slots_per_token is not None:
        if not isinstance(slots_per_token, SIZE_TYPES):
            return False
        slots = num_tokens * slots_per_token
        if slots_per_token < 1 or slots > INT32_MAX:
            return False
        if token_index is None:
            return shape == (slots,) or shape == (num_tokens, slots_per_token)
        if shape != (slots,):
            return False
    return (
        token_index is not None
        and token_index.dtype in ID_DTYPES
        and len(shape) == 1
        and token_index.shape == shape
        and shape[0] <= INT32_MAX
        and token_index.device == expert_index.device
    )


def _refuse(
    token_index: torch.Tensor | None, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> None:
    check_size("num_tokens", num_tokens, least=0)
    check_size("num_experts", num_experts, least=1)
    if slots_per_token is not None:
        check_size("slots_per_token", slots_per_token, least=1)
    if token_index is None:
        if slots_per_token is None:
            raise ValueError("token_index=None: must be a tensor where slots_per_token is None")
        if expert_index.dim() == 2 and expert_index.shape != (num_tokens, slots_per_token):
            wanted = (num_tokens, slots_per_token)
            raise ValueError(f"expert_index: shape {tuple(expert_index.shape)}: must be (num_tokens, slots_per_token) = {wanted} or flat")
        check_ids("expert_index", expert_index.flatten() if expert_index.dim() == 2 else expert_index)
    else:
        check_ids("token_index", token_index)
        check_ids("expert_index", expert_index)
        if token_index.shape != expert_index.shape:
            raise ValueError(f"token_index: length {token_index.shape[0]}: must equal expert_index's length {expert_index.shape[0]}")
        if token_index.device != expert_index.device:
            raise ValueError(f"token_index: device {token_index.device}: must equal expert_index's device {expert_index.device}")
    raise ValueError(
        f"slots_per_token={slots_per_token}: num_tokens * slots_per_token must equal the {expert_index.numel()} slots, "
        f"num_tokens is {num_tokens}"
    )


@operator("sonicmoe_dispatch::plan")
def _plan(
    expert_index: torch.Tensor,
    token_index: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    backend: str = "auto",
) -> torch.Tensor:
    return _make(token_index, expert_index, num_tokens, num_experts, slots_per_token, backend)[0]


@fake(_plan)
def _(
    expert_index: torch.Tensor,
    token_index: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    backend: str = "auto",
) -> torch.Tensor:
    return expert_index.new_empty(packed_size(expert_index.shape[0], num_tokens, num_experts, slots_per_token), dtype=torch.int32)


def _make(
    token_index: torch.Tensor | None,
    expert_index: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    backend: str,
) -> tuple[torch.Tensor, DispatchPlan]:
    """The operator's body: the packed plan, and its parts, which a caller in eager mode takes instead of cutting it once more."""
    if token_index is not None and debug.enabled():
        _check_tokens(token_index, expert_index, num_tokens, num_experts, slots_per_token)
    if backend == "hopper" or (backend == "auto" and plan_hopper.supports(expert_index, num_tokens, num_experts)):
        return plan_hopper.launch(token_index, expert_index, num_tokens, num_experts, slots_per_token)
    plan = _plan_torch(token_index, expert_index, num_tokens, num_experts, slots_per_token)
    return pack(plan), plan


def _plan_torch(
    token_index: torch.Tensor | None, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> DispatchPlan:
    expert = bucket(expert_index, num_experts)
    slot = torch.arange(expert.shape[0], dtype=torch.int32, device=expert.device)
    token_offsets = token_slots = None
    if slots_per_token is not None:
        # Slots are sorted by token already: a stable sort by expert is all there is to do.
        token = slot // slots_per_token
        order = torch.sort(expert.to(torch.int32), stable=True).indices
    else:
        token = bucket(token_index, num_tokens)
        expert = torch.where(token < num_tokens, expert, num_experts)
        token = torch.where(expert < num_experts, token, num_tokens)
        order = torch.sort(expert * (num_tokens + 1) + token, stable=True).indices
        token_offsets = _offsets(token, num_tokens)
        token_slots = torch.sort(token, stable=True).indices.to(torch.int32)
    offsets = _offsets(expert, num_experts)
    in_use = slot < offsets[-1]
    row_to_slot = torch.where(in_use, order.to(torch.int32), -1)
    row_to_token = torch.where(in_use, token[order].to(torch.int32), -1)
    slot_to_row = torch.empty_like(slot).scatter_(0, order, torch.where(in_use, slot, -1))
    sizes = num_tokens, num_experts, slots_per_token
    tickets = offsets.new_zeros(TICKETS)
    return DispatchPlan(offsets, row_to_token, row_to_slot, slot_to_row, token_offsets, token_slots, *sizes, tickets)


def _offsets(buckets: torch.Tensor, size: int) -> torch.Tensor:
    """(size + 1,) int32: the first position of each bucket when ``buckets``, in [0, size], are sorted."""
    return torch.nn.functional.pad(histogram(buckets, size).cumsum(0, dtype=torch.int32), (1, 0))


def _check_tokens(
    token_index: torch.Tensor, expert_index: torch.Tensor, num_tokens: int, num_experts: int, slots_per_token: int | None
) -> None:
    routed = bucket(expert_index, num_experts) < num_experts
    inside = bucket(token_index, num_tokens) < num_tokens
    debug.check_values(inside | ~routed, f"token_index: a routed slot's token is outside [0, {num_tokens})")
    if slots_per_token is not None:
        slot = torch.arange(token_index.shape[0], device=token_index.device)
        debug.check_values(
            token_index == slot // slots_per_token,
            f"slots_per_token={slots_per_token}: slot t * {slots_per_token} + j must belong to token t, token_index says otherwise",
        )
