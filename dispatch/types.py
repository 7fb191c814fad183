"""What a dispatch plan holds. Notation: T tokens, E experts, R rows (one row is one token at one expert)."""

from typing import NamedTuple

import torch


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
        token_offsets = [0, 2, 4, 6]              token t owns token_slots[token_offsets[t]:token_offsets[t + 1]]
        token_slots   = [0, 1, 2, 3, 4, 5]

    All tensors are int32 and on the routing's device.
    """

    offsets: torch.Tensor
    """(E + 1,) first row of each expert; ``offsets[E]`` is the number of rows in use."""
    row_to_token: torch.Tensor
    """(R,) the token of each row, -1 in the tail."""
    row_to_slot: torch.Tensor
    """(R,) the slot of each row, -1 in the tail."""
    slot_to_row: torch.Tensor
    """(R,) the row of each slot, -1 for a sentinel."""
    token_offsets: torch.Tensor
    """(T + 1,) where each token's entries of ``token_slots`` begin."""
    token_slots: torch.Tensor
    """(R,) slots grouped by token, in slot order within a token; sentinels may be listed (their row is -1)."""
    num_tokens: int
    num_experts: int
    slots_per_token: int | None
    """K when slot ``t * K + j`` is token t's j-th choice, else None."""
