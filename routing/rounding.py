"""Token rounding: every expert gets a whole number of tiles. Notation: T tokens, E experts, K experts per token.

Source: token rounding in "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations" (Guo et al., Dec 2025, arXiv 2512.14080).
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from dispatch import count_cumsum
from routing import hopper
from routing.recomputed import Origin, slot_scores_torch
from routing.rounding_hopper import rounded_slots
from routing.scores_hopper import slot_scores
from routing.scoring import check_choice, check_finite, check_logits, check_whole, choose, expert_scores, finite, largest, renormalized
from routing.top_k_hopper import top_k_hopper
from routing.types import Routing

MODES = ("nearest", "up", "down", "stochastic", "balanced")

Targets = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(scores (T, E), the top-K choice (T, K), each expert's rows under it (E,)) -> the rows (E,) int64 that each expert gets instead.

The scores are those that rank an expert's tokens. An expert may lose all its rows and gain up to `most_added`."""


def token_rounding(
    logits: torch.Tensor,
    k: int,
    tile_m: int,
    mode: str = "nearest",
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: str = "top2",
    generator: torch.Generator | None = None,
    targets: Targets | None = None,
    origin: Origin | None = None,
) -> Routing:
    """Top-K routing whose experts' row counts are then rounded to multiples of tile_m, so that no tile is partly empty.

    An expert that rounds down drops its lowest-scoring tokens; one that rounds up adds its highest-scoring tokens among those
    that had not chosen it (selection bias and groups do not matter there). The score that ranks them is the expert's softmax
    over all experts, or its sigmoid, before renormalisation and scale; of equals the lower token goes first.

    With C_e an expert's rows under top-K, its rows N_e become C_e rounded to a multiple of tile_m:

    - "nearest": to the nearest, halves up.
    - "up", "down": to the next above or below.
    - "stochastic": up with probability (C_e mod tile_m) / tile_m, so that N_e is C_e in expectation.
    - "balanced": errors are carried from expert to expert, N_e = tile_m * (round(S_e / tile_m) - round(S_{e-1} / tile_m)) with
      S_e = C_0 + ... + C_e and halves up, so that the total stays within tile_m / 2 of T * K.

    On an sm_90 GPU kernels compute it, within the limits of :func:`routing.hopper.supports`; PyTorch elsewhere. Scores that differ in
    their last bits only may rank differently on another device.

    In each |N_e - C_e| < tile_m. No expert can have more than T tokens: one that would need more to round up rounds down in
    every mode. Such experts are left out of "balanced"'s sums, whose promise then holds for the others, and of "stochastic"'s.
    With T < tile_m that is every expert, and all rows are dropped.

    Args:
        logits: (T, E) floating point.
        k: K, 1 <= K <= E.
        tile_m: rows per tile, >= 1.
        mode: one of the above.
        scoring, scale, selection_bias, num_groups, groups_per_token, group_score: as in top_k.
        renormalize: divide each row's score by the sum over its token's final rows. "softmax_topk" is the softmax over the
            logits of the token's final rows.
        generator: the source of "stochastic"'s random numbers, on the logits' device; torch's default one if None. torch.compile
            traces only None.
        targets: what decides the experts' rows in place of the rule above, where these tokens are a part of those whose rows are to
            be whole tiles (expert parallelism). Computed in PyTorch on every device; the capacity grows accordingly.
        origin: as in top_k.

    Returns:
        A Routing of `capacity(...)` slots, a number that depends on shapes only. The slots in use come first, ascending by token,
        within a token those of its top-K in their order and then the added ones by expert; the rest are sentinels with
        token T, expert E and score 0. Differentiable in the logits through score.

    Raises:
        TypeError, ValueError: what does not fit, named with its value.

    Worked example, T=4, E=2, K=1, tile_m=2, mode="nearest": C = [3, 1] becomes N = [4, 2]::

        logits       = [[2, 0], [1, 0], [3, 0], [0, 1]]
        token_index  = [0, 1, 1, 2, 3, 3]
        expert_index = [0, 0, 1, 0, 1, 0]      (token 1 is the likeliest of 0, 1, 2 to go to expert 1)
    """
    check_logits(logits, selection_bias)
    num_tokens, num_experts = logits.shape
    check_choice(num_experts, k, scoring, scale, num_groups, groups_per_token, group_score)
    check_rounding(tile_m, mode)
    check_finite(logits)
    if targets is None and hopper.supports(logits, k, groups_per_token):
        logits = logits.float()
        groups = (num_groups, groups_per_token, group_score)
        token_index, expert_index, token_offsets = _round_hopper(
            logits.detach(), selection_bias, k, tile_m, mode, scoring, groups, generator
        )
        score = slot_scores(logits, expert_index, token_offsets, scoring, renormalize, scale, *(origin or (None, None)))
        return Routing(token_index, expert_index, score, num_tokens, num_experts, None)
    values = finite(logits.detach())
    chosen = choose(
        values,
        k,
        scoring=scoring,
        selection_bias=selection_bias,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        group_score=group_score,
    )
    token_index, expert_index = _round(expert_scores(values, scoring), chosen, tile_m, mode, generator, targets)
    score = partial(_final_scores, scoring=scoring, renormalize=renormalize, scale=scale)
    score = slot_scores_torch(score, logits, (token_index, expert_index), origin)
    return Routing(token_index, expert_index, score, num_tokens, num_experts, None)


def check_rounding(tile_m: int, mode: str) -> None:
    """Refuse a rounding that cannot be made, whatever the logits."""
    check_whole("tile_m", tile_m)
    if tile_m < 1:
        raise ValueError(f"tile_m={tile_m}: must be at least 1")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")


def capacity(num_tokens: int, num_experts: int, k: int, tile_m: int, mode: str) -> int:
    """The most rows that token rounding can end up with, a multiple of tile_m.

    An expert gains at most ``most_added`` rows and must have some to gain any: one, or half a tile for "nearest". "balanced" gains
    half a tile in total. No expert has more whole tiles than fit into T tokens.
    """
    chosen = num_tokens * k
    if mode == "balanced":
        gained = tile_m // 2
    else:
        least = (tile_m + 1) // 2 if mode == "nearest" else 1
        gained = min(num_experts, chosen // least) * most_added(tile_m, mode)
    return min((chosen + gained) // tile_m, num_experts * (num_tokens // tile_m)) * tile_m


def part_capacity(num_tokens: int, num_experts: int, k: int, tile_m: int, mode: str) -> int:
    """The most rows that a part of the tokens can end up with: all that its experts gain may fall on it."""
    gained = min(most_added(tile_m, mode), num_tokens)
    return min(num_tokens * k + num_experts * gained, num_tokens * num_experts)


def rounded_counts(counts: torch.Tensor, num_tokens: int, tile_m: int, mode: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """(E,) int64: the experts' row counts (E,) rounded as token_rounding describes."""
    counts = counts.long()
    below = counts // tile_m * tile_m
    excess = counts - below
    can_rise = below + tile_m <= num_tokens
    if mode == "up":
        rises = excess > 0
    elif mode == "down":
        rises = torch.zeros_like(can_rise)
    elif mode == "nearest":
        rises = 2 * excess >= tile_m
    elif mode == "stochastic":
        rises = _draws(counts, generator) * tile_m < excess
    else:
        # Whole tiles do not change the differences of the rounded sums, so the sums of the excesses will do.
        excess = torch.where(can_rise, excess, 0)
        after = excess.cumsum(0)
        rises = (2 * after + tile_m) // (2 * tile_m) > (2 * (after - excess) + tile_m) // (2 * tile_m)
    return below + torch.where(rises & can_rise, tile_m, 0)


def _draws(counts: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """(E,) float32, uniform in [0, 1)."""
    # Not torch.rand: given a generator, even None, it takes no symbolic shape under torch.compile.
    return torch.empty_like(counts, dtype=torch.float32).uniform_(generator=generator)


def most_added(tile_m: int, mode: str) -> int:
    """How many rows an expert can gain."""
    return {"down": 0, "nearest": tile_m // 2}.get(mode, tile_m - 1)


def _round_hopper(
    logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    k: int,
    tile_m: int,
    mode: str,
    scoring: str,
    groups: tuple[int, int, str],
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """token_index and expert_index of the final slots and where each token's begin, by the kernels."""
    num_tokens, num_experts = logits.shape
    _, chosen, _ = top_k_hopper(logits, selection_bias, k, scoring, False, 1.0, *groups, None, None)
    counts, _ = count_cumsum(chosen, num_experts, cumsum=False)
    draws = _draws(counts, generator) if mode == "stochastic" else None
    num_slots = capacity(num_tokens, num_experts, k, tile_m, mode)
    return rounded_slots(logits, chosen, counts, draws, num_slots, tile_m, mode, scoring)


@torch.no_grad()
def _round(
    scores: torch.Tensor,
    chosen: torch.Tensor,
    tile_m: int,
    mode: str,
    generator: torch.Generator | None,
    targets: Targets | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_index and expert_index of the final slots, from all scores (T, E) and the top-K choice (T, K)."""
    (num_tokens, num_experts), k = scores.shape, chosen.shape[1]
    device = scores.device
    expert = chosen.flatten()
    token = torch.arange(num_tokens * k, device=device) // k
    counts, ends = count_cumsum(expert, num_experts)
    if targets is None:
        num_slots = capacity(num_tokens, num_experts, k, tile_m, mode)
        target = rounded_counts(counts, num_tokens, tile_m, mode, generator)
    else:
        num_slots = part_capacity(num_tokens, num_experts, k, tile_m, mode)
        target = targets(scores, chosen, counts)

    # A slot stays if its rank in its expert is below the target. Two stable sorts rank by (expert, -score, token).
    order = torch.sort(scores.gather(1, chosen).flatten(), descending=True, stable=True).indices
    order = order[torch.sort(expert[order], stable=True).indices]
    rank = torch.arange(order.shape[0], device=device) - (ends - counts)[expert[order]]
    stays = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < target[expert[order]])

    candidates = min(most_added(tile_m, mode), num_tokens)
    unchosen = scores.scatter(1, chosen, -math.inf).t().contiguous()
    added = largest(unchosen, candidates)
    joins = torch.arange(candidates, device=device) < (target - counts).unsqueeze(1)

    expert = torch.cat([expert, torch.arange(num_experts, device=device).repeat_interleave(candidates)])
    token = torch.where(torch.cat([stays, joins.flatten()]), torch.cat([token, added.flatten()]), num_tokens)
    first = torch.sort(token, stable=True).indices[:num_slots]
    token = token[first]
    expert = torch.where(token < num_tokens, expert[first], num_experts)
    return token.to(torch.int32), expert.to(torch.int32)


def _final_scores(
    logits: torch.Tensor, token_index: torch.Tensor, expert_index: torch.Tensor, *, scoring: str, renormalize: bool, scale: float
) -> torch.Tensor:
    """(R,) the scores of the slots, 0 for sentinels.

    Sums over a token's rows are taken in a masked (T, E) matrix: on a GPU a sum by index would use atomics, forward or backward.
    """
    logits = finite(logits)
    scores = expert_scores(logits, scoring)
    num_tokens, num_experts = scores.shape
    position = token_index.long() * num_experts + expert_index
    in_use = expert_index < num_experts
    if renormalize or scoring == "softmax_topk":
        final = torch.zeros(num_tokens * num_experts + 1, dtype=torch.bool, device=scores.device)
        final = final.scatter_(0, position.clamp(max=num_tokens * num_experts), True)[:-1].view(num_tokens, num_experts)
        if scoring == "softmax_topk":
            # A token without rows keeps all its logits, lest its unread softmax divide zero by zero.
            kept = final | ~final.any(dim=1, keepdim=True)
            scores = torch.softmax(logits.masked_fill(~kept, -math.inf), dim=1)
        else:
            scores = renormalized(scores.masked_fill(~final, 0))
    return scores.flatten().gather(0, torch.where(in_use, position, 0)).masked_fill(~in_use, 0) * scale
