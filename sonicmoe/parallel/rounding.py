"""Token rounding over the tokens of all processes: the tiles that are to be whole are the experts', wherever their rows come from.

Every process proposes, for each expert, the scores of the tokens that would be the first to leave it or to join it. The process that
owns the expert takes the best proposals until its rows are whole tiles, and answers how many of each process's it took. So a process
sends E * (tile_m - 1) scores, however many processes there are, and the result is, token by token, that of `routing.token_rounding`
on all tokens in the order of the ranks.
Notation: W processes, E experts, T tokens of this process, M proposals.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from routing.rounding import rounded_counts
from sonicmoe.parallel.failures import naming_failures


@dataclass(frozen=True)
class GlobalTargets:
    """The argument ``targets`` of `routing.token_rounding` for one part of the tokens. A collective of the group; no host read."""

    group: dist.ProcessGroup
    tile_m: int
    mode: str

    @torch.no_grad()
    def __call__(self, scores: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        proposals = self.tile_m - 1
        if proposals == 0:
            return counts.long()
        all_counts, tokens = self._totals(counts, scores.shape[0])
        target = self._all_targets(all_counts, tokens)
        change = target - all_counts
        values = torch.where((change > 0).unsqueeze(1), *_proposed(scores, chosen, proposals))
        return counts.long() + self._taken(values, change) * change.sign()

    def _totals(self, counts: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Over all processes: each expert's rows (E,), and the number of tokens (), a tensor."""
        totals = torch.cat([counts.long(), counts.new_full((1,), num_tokens, dtype=torch.int64)])
        with naming_failures(self.group):
            dist.all_reduce(totals, group=self.group)
        return totals[:-1], totals[-1]

    def _all_targets(self, counts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        target = rounded_counts(counts, tokens, self.tile_m, self.mode)
        if self.mode == "stochastic":  # every process has drawn its own numbers; the first one's count
            with naming_failures(self.group):
                dist.broadcast(target, group=self.group, group_src=0)
        return target

    def _taken(self, values: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """(E,): how many of this process's proposals (E, M) the experts' owners take, |change| of each expert over all processes."""
        processes = dist.get_world_size(self.group)
        experts = change.shape[0] // processes
        own = change[dist.get_rank(self.group) * experts :][:experts]
        incoming = torch.empty_like(values)
        with naming_failures(self.group):
            dist.all_to_all_single(incoming, values.contiguous(), group=self.group)
        by_source = incoming.view(processes, experts, -1).transpose(0, 1)
        # Of equals the lower token joins first and the higher one leaves first; tokens ascend by process.
        leaves = (own < 0).view(-1, 1, 1)
        in_order = torch.where(leaves, by_source.flip(1), by_source)
        order = torch.sort(in_order.flatten(1), descending=True, stable=True).indices
        takes = torch.arange(order.shape[1], device=order.device) < own.abs().unsqueeze(1)
        taken = torch.zeros_like(takes).scatter_(1, order, takes).view_as(in_order).sum(2)
        taken = torch.where(leaves.squeeze(2), taken.flip(1), taken)
        answer = torch.empty_like(change)
        with naming_failures(self.group):
            dist.all_to_all_single(answer, taken.t().contiguous().flatten(), group=self.group)
        return answer


def _proposed(scores: torch.Tensor, chosen: torch.Tensor, proposals: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (E, M), descending, -inf where there are fewer: scores of the tokens first to join, minus scores of those first to leave."""
    num_tokens, num_experts = scores.shape
    here = min(proposals, num_tokens)
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    best = []
    for value in (scores.masked_fill(is_chosen, -torch.inf), (-scores).masked_fill(~is_chosen, -torch.inf)):
        found = scores.new_full((num_experts, proposals), -torch.inf)
        found[:, :here] = torch.topk(value.t(), here, dim=1).values
        best.append(found)
    return tuple(best)
