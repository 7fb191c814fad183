"""Scores of experts and the choice of the K best, shared by every routing. Notation: T tokens, E experts, K experts per token.

Non-finite logits. NaN and -inf count as the lowest finite float32, +inf as the highest, and their gradient is zero. So every
score is finite, every index is in range and the same on every device, without looking at the values on the host; a token
whose logits are all NaN goes to experts 0..K-1. Under the debug switch they are an error.

Ties. Of two experts with the same value the lower index is chosen first. torch.topk does not promise that, see `largest`.
"""

import math

import torch

from dispatch import debug
from dispatch.operators import fake, operator

SCORINGS = ("softmax", "softmax_topk", "sigmoid")
GROUP_SCORES = ("top2", "max")

# Keeps a sum of vanishing sigmoids from dividing by zero; the value of DeepSeek-V3's published router.
_LEAST_SUM = 1e-20

_BLOCK_ELEMENTS_CPU = 2**18


def check_choice(num_experts: int, k: int, scoring: str, scale: float, num_groups: int, groups_per_token: int, group_score: str) -> None:
    """Refuse a choice of experts that cannot be made, whatever the logits."""
    for name, value in (("k", k), ("num_groups", num_groups), ("groups_per_token", groups_per_token)):
        if type(value) is not int:  # the usual case costs no call
            check_whole(name, value)
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k}: must be between 1 and the number of experts, {num_experts}")
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r}: must be one of {', '.join(SCORINGS)}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale={scale}: must be finite")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups}: must be at least 1 and divide the number of experts, {num_experts}")
    if not 1 <= groups_per_token <= num_groups:
        raise ValueError(f"groups_per_token={groups_per_token}: must be between 1 and num_groups={num_groups}")
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score={group_score!r}: must be one of {', '.join(GROUP_SCORES)}")
    if groups_per_token * (num_experts // num_groups) < k:
        raise ValueError(
            f"groups_per_token={groups_per_token}: {groups_per_token} groups of {num_experts // num_groups} experts must hold k={k}"
        )


def check_whole(name: str, value: int) -> None:
    """Refuse what is no integer, 2.0 included."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be an int")


def check_logits(logits: torch.Tensor, selection_bias: torch.Tensor | None = None) -> None:
    """Refuse logits that are not (T, E) floating point, and a bias that does not fit them."""
    if not logits.is_floating_point():
        raise TypeError(f"logits: dtype {logits.dtype}: must be a floating-point dtype")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: shape {tuple(logits.shape)}: must be (T, E) with E >= 1")
    if selection_bias is not None:
        if not selection_bias.is_floating_point():
            raise TypeError(f"selection_bias: dtype {selection_bias.dtype}: must be a floating-point dtype")
        if selection_bias.shape != (logits.shape[1],):
            raise ValueError(f"selection_bias: shape {tuple(selection_bias.shape)}: must be (E,) with E={logits.shape[1]}")
        if selection_bias.device != logits.device:
            raise ValueError(f"selection_bias: device {selection_bias.device}: must be the logits' device {logits.device}")


def check_finite(logits: torch.Tensor) -> None:
    """Under the debug switch, refuse logits that are not finite."""
    if debug.enabled():
        debug.check_values(torch.isfinite(logits.detach()), "logits: must be finite, some are NaN or infinite")


def finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 (float64 for float64), non-finite values replaced as the module's docstring says."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    limits = torch.finfo(torch.float32)
    return torch.nan_to_num(logits, nan=limits.min, posinf=limits.max, neginf=limits.min)


def expert_scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """(T, E) every expert's score: the sigmoid of its logit, or the softmax over all experts."""
    return torch.sigmoid(logits) if scoring == "sigmoid" else torch.softmax(logits, dim=1)


def renormalized(score: torch.Tensor) -> torch.Tensor:
    """Scores divided by their sum over the last dimension."""
    return score / (score.sum(dim=-1, keepdim=True) + _LEAST_SUM)


@torch.no_grad()
def choose(
    logits: torch.Tensor,
    k: int,
    *,
    scoring: str,
    selection_bias: torch.Tensor | None,
    num_groups: int,
    groups_per_token: int,
    group_score: str,
) -> torch.Tensor:
    """(T, k) int64: each token's experts, best first, from finite logits.

    What is compared: the biased score if there is a bias or if groups are judged by a sum of scores; else the logits, whose
    order is the scores' order but does not depend on how a device rounds exp. Group-limited choice is that of DeepSeek-V2
    (group_score "max", arXiv 2405.04434, section 2.2.2) and DeepSeek-V3 ("top2", arXiv 2412.19437, section 2.1.2): experts
    outside the groups_per_token best groups are out of the question, even those with a higher value than any inside.
    """
    value = logits
    grouped = num_groups > 1
    if scoring != "softmax_topk" and (selection_bias is not None or (grouped and group_score == "top2")):
        value = expert_scores(logits, scoring)
    if selection_bias is not None:
        # Finite again: -inf is for the experts of the groups that were not chosen.
        limits = torch.finfo(torch.float32)
        value = torch.nan_to_num(value + selection_bias.to(value.dtype), nan=limits.min, posinf=limits.max, neginf=limits.min)
    if grouped:
        by_group = value.unflatten(1, (num_groups, -1))
        best = largest(by_group, min(2, by_group.shape[2]) if group_score == "top2" else 1)
        group_value = by_group.gather(2, best).sum(dim=2)
        chosen = torch.zeros_like(group_value, dtype=torch.bool).scatter_(1, largest(group_value, groups_per_token), True)
        value = by_group.masked_fill(~chosen.unsqueeze(2), -math.inf).flatten(1)
    return largest(value, k)


@operator("sonicmoe_routing::largest")
def largest(value: torch.Tensor, k: int) -> torch.Tensor:
    """(..., k) int64: where the k largest of the last dimension are, largest first, of equals the lower index first.

    float32 values become int64 keys with the index in the low half, so that no two are equal and torch.topk has no choice:
    five times faster on a CPU than the stable sort that is left for float64.
    """
    if value.dtype == torch.float64:
        return torch.sort(value, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    lines = value.flatten(0, -2)
    where = torch.empty(lines.shape[0], k, dtype=torch.int64, device=value.device)
    index = torch.arange(value.shape[-1], device=value.device)
    # On a CPU in blocks that stay in the cache; fresh memory for all keys at once costs more than the choice itself.
    step = max(1, lines.shape[0] if value.is_cuda else _BLOCK_ELEMENTS_CPU // max(1, value.shape[-1]))
    for begin in range(0, lines.shape[0], step):
        bits = (lines[begin : begin + step] + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
        # Negative floats ascend as their magnitude's bits descend.
        key = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long().bitwise_left_shift_(32).sub_(index)
        where[begin : begin + step] = torch.topk(key, k, dim=-1).indices
    return where.unflatten(0, value.shape[:-1])


@fake(largest)
def _(value: torch.Tensor, k: int) -> torch.Tensor:
    return value.new_empty((*value.shape[:-1], k), dtype=torch.int64)
