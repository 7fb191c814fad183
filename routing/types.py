"""What a router decides. Notation: T tokens, E experts, K experts per token, R routed slots."""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Which tokens go to which experts, and with what weight.

    R is T*K for top-K. For token rounding it is a capacity that depends on shapes only, so that no host synchronisation
    is needed; slots that are not used are sentinels. An ``expert_index`` outside [0, E) is a sentinel: the slot costs
    nothing, contributes nothing, and its ``score`` is 0. A sentinel's ``token_index`` is a valid token or T.
    """

    token_index: torch.Tensor | None
    """(R,) int32; None where slots_per_token says it all: `tokens` writes it out."""
    expert_index: torch.Tensor
    """(R,) int32 (int64 is taken too), sentinels outside [0, E)."""
    score: torch.Tensor
    """(R,) float32 (float64 for float64 logits), differentiable in the logits."""
    num_tokens: int
    num_experts: int
    slots_per_token: int | None
    """K when slot ``t * K + j`` is token t's j-th choice, else None."""

    def tokens(self) -> torch.Tensor:
        """(R,) the token of each slot: token_index, made from slots_per_token where it is None."""
        if self.token_index is not None:
            return self.token_index
        slots = torch.arange(self.expert_index.shape[0], dtype=torch.int32, device=self.expert_index.device)
        return slots // self.slots_per_token
