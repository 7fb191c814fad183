"""What a process sends: each token once to every process that has one of its experts, whatever the number of its experts there.

Notation: W processes, E experts of which each process owns E/W neighbours, T tokens of this process, R routed slots, C chunks of
tokens that travel one after the other. A *copy* is one token on its way to one process; a *slot* is one token at one expert. Copies
travel chunk by chunk, the slots of all chunks at once. Everything here is index arithmetic on the tokens' device; nothing waits for it.
"""

from typing import NamedTuple

import torch

import dispatch
from dispatch import DispatchPlan
from routing import Routing


class Sends(NamedTuple):
    """A routing's copies and slots in the order in which they travel.

    Worked example, W=2, E=4, C=1, T=3, K=2, ``expert_index = [0, 1, 2, 0, 3, 9]`` (9 is a sentinel)::

        slots travel as    0  1  3 | 2  4          process 0 owns experts 0 and 1, process 1 owns 2 and 3
        token of the slot  0  0  1 | 1  2
        copies travel as   0  1 | 1  2             tokens; token 0 travels once to process 0, for two experts
        labels, position   0  0  1 | 0  1          which of the copies of its chunk and destination the slot belongs to
                expert     0  1  0 | 0  1          counted from the destination's first
    """

    copies: DispatchPlan
    """Of T * W candidates, ``t * W + w`` for token t and process w, those that travel: its experts are the C * W pairs of a chunk and a
    destination, chunk first. So ``row_to_token`` says which tokens travel, and `dispatch.gather_sum` adds a token's copies, by process."""
    slots: DispatchPlan
    """Of the R slots: its experts are the W * C pairs of a destination and a chunk, destination first."""
    position: torch.Tensor
    """(R,) int32 of each slot of the routing: which of the copies of its chunk and destination it belongs to. Anything for a sentinel."""

    def counts(self, chunks: int) -> torch.Tensor:
        """(W, C, 2) int32: copies and slots to each process in each chunk."""
        copies, slots = self.copies.offsets, self.slots.offsets
        counts = copies.new_empty(self.copies.slots_per_token, chunks, 2)
        torch.sub(copies[1:].view(chunks, -1).t(), copies[:-1].view(chunks, -1).t(), out=counts[..., 0])
        torch.sub(slots[1:].view(-1, chunks), slots[:-1].view(-1, chunks), out=counts[..., 1])
        return counts

    def labels(self, routing: Routing, *, processes: int) -> torch.Tensor:
        """(R, 2 + s) int32 in the order in which slots travel: position, expert counted from the destination's first, and the s words
        of the score. Anything behind the last slot that travels."""
        expert = routing.expert_index.int().remainder(routing.num_experts // processes)
        words = routing.score.detach().contiguous().unsqueeze(1).view(torch.int32)
        of_slots = torch.cat([self.position.unsqueeze(1), expert.unsqueeze(1), words], dim=1)
        return of_slots.index_select(0, self.slots.row_to_slot.clamp(min=0))


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
    tokens, pairs = routing.num_tokens, processes * chunks
    token, expert = routing.tokens(), routing.expert_index
    live = (expert >= 0) & (expert < routing.num_experts)
    if routing.token_index is not None:
        live = live & (token >= 0) & (token < tokens)
    owner = expert // (routing.num_experts // processes)
    candidate = torch.where(live, torch.add(owner, token, alpha=processes), tokens * processes).long()
    # A candidate that no slot names is a sentinel; slots with the same one write the same, the sentinels' into a place behind the last.
    if chunks == 1:
        copy_pair = slot_pair = owner
    else:
        chunk = ((token.long() + 1) * chunks - 1) // max(tokens, 1)  # the chunk_bounds between which the token lies
        copy_pair = torch.add(owner, chunk, alpha=processes).to(expert.dtype)
        slot_pair = torch.add(chunk, owner, alpha=chunks).to(expert.dtype)
    travels = expert.new_full((tokens * processes + 1,), -1).scatter_(0, candidate, copy_pair)[:-1]
    copies = dispatch.plan(None, travels, num_tokens=tokens, num_experts=pairs, slots_per_token=processes)
    shape = {"num_tokens": tokens, "num_experts": pairs, "slots_per_token": routing.slots_per_token}
    slots = dispatch.plan(routing.token_index, torch.where(live, slot_pair, -1), **shape)
    if tokens == 0:
        return Sends(copies, slots, torch.zeros_like(slots.slot_to_row))
    row = copies.slot_to_row[candidate.clamp_(max=tokens * processes - 1)]
    return Sends(copies, slots, row - copies.offsets[torch.where(live, copy_pair, 0)])
