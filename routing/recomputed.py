"""Scores by PyTorch whose gradient keeps no logits. Notation: T tokens, H hidden size, E experts, R slots."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from dispatch.operators import is_direct, needs_gradient
from routing.linalg import linear

Origin = tuple[torch.Tensor, torch.Tensor]
"""(x (T, H), weight (E, H)) whose product :func:`routing.linalg.linear` the logits are, bit for bit. Backward keeps these, which
others keep anyway, and multiplies them again: logits of many experts are otherwise most of what a routing keeps."""


def slot_scores_torch(
    score: Callable[..., torch.Tensor], logits: torch.Tensor, indices: tuple[torch.Tensor, ...], origin: Origin | None
) -> torch.Tensor:
    """``score(logits, *indices)``, differentiable in the logits; with an origin once, and without keeping what is of size (T, E).

    torch.compile, dispatch modes and functorch's transforms see the operations themselves and decide what is kept.
    """
    if origin is None or not (torch.is_grad_enabled() and needs_gradient((logits,)) and is_direct((logits, *origin))):
        return score(logits, *indices)
    return _Scores.apply(logits, score, *origin, *indices)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, score, *tensors):
        ctx.score = score
        ctx.save_for_backward(*tensors)
        return score(logits, *tensors[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx, score_grad):
        x, weight, *indices = ctx.saved_tensors
        logits = linear(x.detach(), weight.detach()).requires_grad_()
        with torch.enable_grad():
            score = ctx.score(logits, *indices)
        (logits_grad,) = torch.autograd.grad(score, logits, score_grad)
        return logits_grad, *(None,) * (3 + len(indices))
