"""Top-K routing: each token takes its K best experts. Notation: T tokens, E experts, K experts per token."""

from functools import partial

import torch

from routing import hopper
from routing.recomputed import Origin, slot_scores_torch
from routing.scoring import check_choice, check_finite, check_logits, choose, expert_scores, finite, renormalized
from routing.top_k_hopper import top_k_hopper
from routing.types import Routing


def top_k(
    logits: torch.Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: str = "top2",
    origin: Origin | None = None,
) -> Routing:
    """Route each token to its k best experts.

    One kernel computes it on an sm_90 GPU, within the limits of :func:`routing.hopper.supports`; PyTorch elsewhere.

    Args:
        logits: (T, E) floating point. Scores are computed in float32, in float64 for float64 logits.
        k: K, 1 <= K <= E.
        scoring: "softmax", over all experts before the choice (Switch, Qwen3, OLMoE, DeepSeek-V2); "softmax_topk", over the
            K chosen logits after it (gpt-oss, and Mixtral, whose softmax then renormalisation is the same); "sigmoid"
            (DeepSeek-V3).
        renormalize: divide a token's K scores by their sum. After "softmax_topk" the sum is one already.
        scale: a factor on every score (DeepSeek's routed_scaling_factor).
        selection_bias: (E,) added to the scores (to the logits for "softmax_topk") for the choice only; the scores returned are
            without it (DeepSeek-V3's auxiliary-loss-free balancing, arXiv 2408.15664). Gets no gradient.
        num_groups, groups_per_token: the experts form num_groups groups of neighbours, and a token's experts come from its
            groups_per_token best groups.
        group_score: a group's value, the sum of its two best experts ("top2", DeepSeek-V3) or its best one ("max", DeepSeek-V2).
        origin: (x, weight) that the logits are the product of, see routing/recomputed.py: backward multiplies them again and keeps no
            logits. No gradient goes to them from here. None: the logits are kept.

    Returns:
        A Routing of R = T * K slots: slot ``t * K + j`` is token t's j-th best expert. Differentiable in the logits through
        score; the choice itself has no gradient. Ties and non-finite logits: see routing/scoring.py.

    Raises:
        TypeError, ValueError: what does not fit, named with its value.

    Worked example, E=3, K=2, two tokens, scoring="softmax_topk"::

        logits       = [[0, 1, 1], [ln 3, 0, -5]]
        token_index  = [0, 0, 1, 1]
        expert_index = [1, 2, 0, 1]
        score        = [1/2, 1/2, 3/4, 1/4]
    """
    check_logits(logits, selection_bias)
    num_tokens, num_experts = logits.shape
    check_choice(num_experts, k, scoring, scale, num_groups, groups_per_token, group_score)
    check_finite(logits)
    if hopper.supports(logits, k, groups_per_token):
        settings = (k, scoring, renormalize, scale, num_groups, groups_per_token, group_score)
        return Routing(*top_k_hopper(logits, selection_bias, *settings, *(origin or (None, None))), num_tokens, num_experts, k)
    expert_index = choose(
        finite(logits.detach()),
        k,
        scoring=scoring,
        selection_bias=selection_bias,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        group_score=group_score,
    )
    score = partial(_chosen_scores, scoring=scoring, renormalize=renormalize, scale=scale)
    narrow = expert_index.to(torch.int32)
    return Routing(
        token_index=torch.arange(num_tokens * k, dtype=torch.int32, device=logits.device) // k,
        expert_index=narrow.flatten(),
        score=slot_scores_torch(score, logits, (narrow,), origin),
        num_tokens=num_tokens,
        num_experts=num_experts,
        slots_per_token=k,
    )


def _chosen_scores(logits: torch.Tensor, expert_index: torch.Tensor, *, scoring: str, renormalize: bool, scale: float) -> torch.Tensor:
    """(T * K,) the scores of each token's experts (T, K)."""
    logits, expert_index = finite(logits), expert_index.long()
    if scoring == "softmax_topk":
        score = torch.softmax(logits.gather(1, expert_index), dim=1)
    else:
        score = expert_scores(logits, scoring).gather(1, expert_index)
        if renormalize:
            score = renormalized(score)
    return score.flatten() * scale  # a tensor of its own, not a view: wrappers such as FSDP2 hook what a layer returns
