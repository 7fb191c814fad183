"""What a dispatch plan holds. Notation: T tokens, E experts, R rows (one row is one token at one expert)."""

from typing import NamedTuple

import torch

from dispatch.kernels.sizes import TICKETS


class DispatchPlan(NamedTuple):
    """Who goes where: the rows of all experts, one expert's rows next to each other, ascending by token within an expert.

    A *slot* is a position in the routing's lists; a *row* is a position in the experts' buffers. Slots whose expert is
    outside [0, E) are sentinels: they have no row. R is the number of slots, so it is known without looking at the data;
    the rows in use are ``[0, offsets[E])`` and the rest is tail that no kernel reads or writes.

    Worked example, T=3, E=2, K=2, ``expert_index = [1, 0, 1, 2, 0, 1]`` (slot 3 is a sentinel, 2 is no expert)::

        slot            0  1  2  3  4  5
        token           0  0  1  1  2  2
        expert          1  0  1  -  0  1
        offsets       = [0, 2, 5]                 expert 0 owns rows 0..1, expert 1 rows 2..4
        row_to_slot   = [1, 4, 0, 2, 5, -1]
        row_to_token  = [0, 2, 0, 1, 2, -1]
        slot_to_row   = [2, 0, 3, -1, 1, 4]

    and without ``slots_per_token=2``, which says as much::

        token_offsets = [0, 2, 3, 5]              token t owns token_slots[token_offsets[t]:token_offsets[t + 1]]
        token_slots   = [0, 1, 2, 4, 5, 3]        behind them the sentinels

    All tensors are int32 and on the routing's device; what backward keeps of them is one tensor, see :func:`pack`.
    """

    offsets: torch.Tensor
    """(E + 1,) first row of each expert; ``offsets[E]`` is the number of rows in use."""
    row_to_token: torch.Tensor
    """(R,) the token of each row, -1 in the tail."""
    row_to_slot: torch.Tensor
    """(R,) the slot of each row, -1 in the tail."""
    slot_to_row: torch.Tensor
    """(R,) the row of each slot, -1 for a sentinel."""
    token_offsets: torch.Tensor | None
    """(T + 1,) where each token's entries of ``token_slots`` begin; None with slots_per_token: t * K."""
    token_slots: torch.Tensor | None
    """(R,) slots grouped by token, in slot order within a token, sentinels behind them. None with slots_per_token: 0, 1, ..."""
    num_tokens: int
    num_experts: int
    slots_per_token: int | None
    """K when slot ``t * K + j`` is token t's j-th choice, else None."""
    tickets: torch.Tensor | None = None
    """(TICKETS,) zeros, by which the blocks of a kernel share out its tiles: a kernel counts in its own one, and leaves it zero. So
    one kernel may not run twice at a time on the same plan. None: whoever needs them makes some."""


def pack(plan: DispatchPlan) -> torch.Tensor:
    """What backward keeps of a plan, which is what an operator returns: one tensor that :func:`unpack` takes apart.

    row_to_slot, slot_to_row, offsets, tickets (zeros); without slots_per_token also row_to_token, token_slots and token_offsets. Those of
    R elements come first, so that they keep the alignment that R allows.
    """
    tickets = plan.offsets.new_zeros(TICKETS)
    if plan.slots_per_token is not None:
        return torch.cat((plan.row_to_slot, plan.slot_to_row, plan.offsets, tickets))
    by_row = (plan.row_to_token, plan.row_to_slot, plan.slot_to_row, plan.token_slots)
    return torch.cat((*by_row, plan.offsets, plan.token_offsets, tickets))


def packed_size(num_slots: int, num_tokens: int, num_experts: int, slots_per_token: int | None) -> int:
    """Elements of a packed plan: 2 R + (E + 1) + TICKETS with slots_per_token, else 4 R + (E + 1) + (T + 1) + TICKETS."""
    if slots_per_token is not None:
        return 2 * num_slots + num_experts + 1 + TICKETS
    return 4 * num_slots + num_experts + num_tokens + 2 + TICKETS


def unpack(
    packed: torch.Tensor,
    num_slots: int,
    num_tokens: int,
    num_experts: int,
    slots_per_token: int | None,
    row_to_token: torch.Tensor | None = None,
) -> DispatchPlan:
    """The plan whose tensors are views of ``packed``, cut in one call; with slots_per_token ``row_to_token`` is the argument, or made."""
    sizes = num_tokens, num_experts, slots_per_token
    if slots_per_token is not None:
        row_to_slot, slot_to_row, offsets, tickets = packed.split_with_sizes((num_slots, num_slots, num_experts + 1, TICKETS))
        if row_to_token is None:
            row_to_token = row_to_slot // slots_per_token  # rounds down: -1 stays -1
        return DispatchPlan(offsets, row_to_token, row_to_slot, slot_to_row, None, None, *sizes, tickets)
    lengths = (num_slots, num_slots, num_slots, num_slots, num_experts + 1, num_tokens + 1, TICKETS)
    row_to_token, row_to_slot, slot_to_row, token_slots, offsets, token_offsets, tickets = packed.split_with_sizes(lengths)
    return DispatchPlan(offsets, row_to_token, row_to_slot, slot_to_row, token_offsets, token_slots, *sizes, tickets)
