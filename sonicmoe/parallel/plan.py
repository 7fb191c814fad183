"""What a process sends: each token once to every process that has one of its experts, whatever the number of its experts there.

Notation: W processes, E experts of which each process owns E/W neighbours, T tokens of this process, R routed slots, C chunks of
tokens that travel one after the other. A *copy* is one token on its way to one process; a *slot* is one token at one expert. Copies
travel chunk by chunk, the slots of all chunks at once. Everything here is index arithmetic on the tokens' device; nothing waits for it.
"""

from typing import NamedTuple

import torch

import dispatch
from dispatch import DispatchPlan, travel
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
    spread: travel.Spread
    """Whose experts the slots choose."""

    def counts(self, chunks: int) -> torch.Tensor:
        """(W, C, 2) int32: copies and slots to each process in each chunk."""
        copies, slots = self.copies.offsets, self.slots.offsets
        counts = copies.new_empty(self.copies.slots_per_token, chunks, 2)
        torch.sub(copies[1:].view(chunks, -1).t(), copies[:-1].view(chunks, -1).t(), out=counts[..., 0])
        torch.sub(slots[1:].view(-1, chunks), slots[:-1].view(-1, chunks), out=counts[..., 1])
        return counts

    def labels(self, score: torch.Tensor) -> torch.Tensor:
        """(R, 2 + s) int32 in the order in which slots travel: position, expert counted from the destination's first, and the s words
        of the score (R,). Anything behind the last slot that travels."""
        return travel.labels(self.spread, score.detach(), self.slots, self.copies)


@torch.no_grad()
def plan_sends(routing: Routing, *, processes: int, chunks: int) -> Sends:
    """The order in which a routing's slots and their tokens travel.

    Args:
        routing: of E experts, a multiple of ``processes``.
        processes: W.
        chunks: C.
    """
    sizes = (routing.num_tokens, routing.num_experts, routing.slots_per_token, processes, chunks)
    spread = travel.Spread(routing.expert_index, routing.token_index, *sizes)
    slot_pair, copy_pair = travel.pairs(spread)
    shape = {"num_tokens": routing.num_tokens, "num_experts": processes * chunks}
    copies = dispatch.plan(None, copy_pair, **shape, slots_per_token=processes)
    slots = dispatch.plan(routing.token_index, slot_pair, **shape, slots_per_token=routing.slots_per_token)
    return Sends(copies, slots, spread)
