"""What a process sends: each token once to every process that has one of its experts, whatever the number of its experts there.

Notation: W processes, E experts of which each process owns E/W neighbours, T tokens of this process, R routed slots, C chunks of
tokens that travel one after the other. A *copy* is one token on its way to one process; a *slot* is one token at one expert.
Everything here is index arithmetic on the tokens' device; nothing waits for it.
"""

from typing import NamedTuple

import torch

import dispatch
from routing import Routing


class Sends(NamedTuple):
    """A routing's slots and copies in the order in which they travel: by chunk, then by destination, token and slot.

    Worked example, W=2, E=4, C=1, T=3, K=2, ``expert_index = [0, 1, 2, 0, 3, 9]`` (9 is a sentinel)::

        slots travel as  0  1  3 | 2  4           process 0 owns experts 0 and 1, process 1 owns 2 and 3
        token_of_slot  = 0  0  1 | 1  2
        slot           = [0, 1, 3, 2, 4, 0]        slot 5 is a sentinel and does not travel
        position       = [0, 0, 1, 0, 1, 0]        token 0 travels once to process 0, for two experts
        expert         = [0, 1, 0, 0, 1, 0]        counted from the destination's first
        copy_token     = [0, 1, 1, 2, 3, 3]        T = 3 behind the last copy
        slot_offsets   = [0, 3, 5]    copy_offsets = [0, 2, 4]
    """

    slot: torch.Tensor
    """(R,) int64 slots of the routing; 0 behind the last one that travels, as in the next two."""
    position: torch.Tensor
    """(R,) int32: which of the copies of its chunk and destination the slot belongs to."""
    expert: torch.Tensor
    """(R,) int32 the slot's expert, counted from the destination's first."""
    copy_token: torch.Tensor
    """(R,) int64 the token of each copy; T behind the last one."""
    slot_offsets: torch.Tensor
    """(C*W + 1,) int64: where the slots of each chunk and destination begin."""
    copy_offsets: torch.Tensor
    """(C*W + 1,) int64: where the copies of each chunk and destination begin."""

    def counts(self, chunks: int) -> torch.Tensor:
        """(C, W, 2) int64: copies and slots of each chunk to each process."""
        return torch.stack([self.copy_offsets.diff(), self.slot_offsets.diff()], dim=-1).view(chunks, -1, 2)


def chunk_bounds(num_tokens: int, chunks: int) -> list[int]:
    """Where each chunk of tokens begins, and T: chunk sizes differ by at most one."""
    return [num_tokens * chunk // chunks for chunk in range(chunks + 1)]


@torch.no_grad()
def plan_sends(routing: Routing, *, processes: int, chunks: int) -> Sends:
    """The order in which a routing's slots and their tokens travel.

    Args:
        routing: of E experts, a multiple of ``processes``.
        processes: W.
        chunks: C.
    """
    device, tokens = routing.expert_index.device, routing.num_tokens
    own = routing.num_experts // processes
    expert = routing.expert_index.long()
    token = routing.tokens().long()
    live = (expert >= 0) & (expert < routing.num_experts) & (token >= 0) & (token < tokens)
    ends = torch.arange(1, chunks + 1, device=device) * tokens // chunks
    chunk = torch.searchsorted(ends, token, right=True)
    buckets = chunks * processes
    bucket = torch.where(live, chunk * processes + expert // own, buckets)
    # The plan sorts by bucket, token and slot; its rows in use come first.
    shape = {"num_tokens": tokens, "num_experts": buckets, "slots_per_token": routing.slots_per_token}
    plan = dispatch.plan(token.int(), bucket.int(), **shape)
    rows = torch.arange(expert.shape[0], device=device)
    in_use = rows < plan.offsets[-1]
    slot = torch.where(in_use, plan.row_to_slot, 0).long()
    row_bucket, row_token = torch.where(in_use, bucket[slot], buckets), torch.where(in_use, token[slot], tokens)
    new_token = torch.cat([in_use[:1], (row_token[1:] != row_token[:-1]) | (row_bucket[1:] != row_bucket[:-1])])
    first = in_use & new_token
    copy = first.cumsum(0)  # copies up to and including this row's
    copy_offsets = torch.cat([copy.new_zeros(1), copy])[plan.offsets.long()]
    # Rows that are no copy's first write into a place of their own behind the last copy, which is cut off.
    copy_token = torch.full((rows.shape[0] + 1,), tokens, device=device)
    copy_token = copy_token.scatter_(0, torch.where(first, copy - 1, rows.shape[0]), torch.where(first, row_token, tokens))
    position = copy - 1 - copy_offsets[row_bucket]
    return Sends(
        slot=slot,
        position=torch.where(in_use, position, 0).int(),
        expert=torch.where(in_use, expert[slot] % own, 0).int(),
        copy_token=copy_token[:-1],
        slot_offsets=plan.offsets.long(),
        copy_offsets=copy_offsets,
    )
