"""Auxiliary losses and numbers to watch. Notation: T tokens, E experts, K experts per token, R routed slots."""

import torch

from dispatch import count_cumsum
from routing.scoring import SCORINGS, check_finite, check_logits, expert_scores, finite, renormalized
from routing.types import Routing


def expert_counts(routing: Routing) -> torch.Tensor:
    """(E,) int32: the rows of each expert, sentinels not counted."""
    return count_cumsum(routing.expert_index, routing.num_experts, cumsum=False)[0]


def wasted_row_ratio(counts: torch.Tensor, tile_m: int) -> torch.Tensor:
    """The share of rows that the hardware computes for nothing when each expert's rows are padded to tiles of tile_m.

    Args:
        counts: (E,) integer, the rows of each expert, such as expert_counts returns.
        tile_m: rows per tile, >= 1.

    Returns:
        A float32 scalar on counts' device: (hardware rows - rows) / hardware rows, 0 without rows.

    Worked example, tile_m=4: counts = [4, 1, 0, 3] take 4 + 4 + 0 + 4 = 12 hardware rows for 8, a ratio of 1/3.
    """
    if tile_m < 1:
        raise ValueError(f"tile_m={tile_m}: must be at least 1")
    if counts.is_floating_point() or counts.dim() != 1:
        raise ValueError(f"counts: shape {tuple(counts.shape)}, dtype {counts.dtype}: must be (E,) integers")
    counts = counts.long()
    hardware = ((counts + tile_m - 1) // tile_m * tile_m).sum()
    return ((hardware - counts.sum()) / hardware.clamp(min=1)).float()


def load_balance_loss(
    logits: torch.Tensor, routing: Routing, *, scoring: str = "softmax", counts: torch.Tensor | None = None
) -> torch.Tensor:
    """``E * sum over e of f_e * P_e``: f_e the rows of expert e per token, P_e the mean of its probability over the tokens.

    The loss of the Switch Transformer (arXiv 2101.03961, equations 4-6), for K > 1 as in transformers' Mixtral: K, not 1, when
    everything is balanced; divide by K to compare across K. Differentiable in the logits through P; f has no gradient.

    Args:
        logits: (T, E) floating point, those the routing was made from.
        routing: a Routing of these T tokens and E experts.
        scoring: "softmax" or "softmax_topk", P from the softmax over all experts; "sigmoid", from the sigmoids divided by
            their sum (DeepSeek-V3, arXiv 2412.19437, equations 17-20).
        counts: (E,) rows of each expert to use in place of the routing's own; f is theirs per token of these logits.

    Returns:
        A float32 scalar (float64 for float64 logits), 0 for T = 0. Non-finite logits: see routing/scoring.py.
    """
    check_logits(logits)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r}: must be one of {', '.join(SCORINGS)}")
    expected = (routing.num_tokens, routing.num_experts)
    if tuple(logits.shape) != expected:
        raise ValueError(f"logits: shape {tuple(logits.shape)}: must be the routing's (T, E) = {expected}")
    check_finite(logits)
    probability = expert_scores(finite(logits), scoring)
    if scoring == "sigmoid":
        probability = renormalized(probability)
    num_tokens, num_experts = expected
    tokens = max(num_tokens, 1)
    counts = expert_counts(routing) if counts is None else counts
    frequency = counts.to(probability.dtype) / tokens
    return num_experts * (frequency * (probability.sum(dim=0) / tokens)).sum()


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of ``logsumexp(logits)^2``, which keeps logits small (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        logits: (T, E) floating point.

    Returns:
        A float32 scalar (float64 for float64 logits), 0 for T = 0. A NaN or +inf logit makes it NaN or inf: unlike a routing, a
        loss should show it.
    """
    check_logits(logits)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.logsumexp(logits, dim=1).square().sum() / max(logits.shape[0], 1)
