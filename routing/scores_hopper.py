"""Host half of kernels/slot_scores.py and kernels/slot_scores_grad.py. Notation: T tokens, E experts, K experts per token, R slots."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from dispatch.operators import differentiable, fake, not_differentiable, operator
from routing.hopper import DTYPE_NAME
from routing.kernels import variants
from routing.linalg import accumulation_dtype, linear


@operator("sonicmoe_routing::slot_scores")
def slot_scores(
    logits: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """(R,) float32 scores of the slots that token_offsets (T + 1,) gives each token, 0 behind them; differentiable in the logits.

    Args:
        logits: (T, E) float32 on an sm_90 GPU.
        expert_index: (R,) int32, inside [0, E) for the tokens' slots.
        scoring, renormalize, scale: as in routing.token_rounding.
        x, weight: the logits' origin (T, H) and (E, H), which backward keeps in their place, or None.
    """
    score = torch.empty_like(expert_index, dtype=torch.float32)
    if score.shape[0]:
        divides = renormalize and scoring != "softmax_topk"
        with cute_runtime.on_device(logits.device):
            _scores_kernel(scoring)(logits.contiguous(), expert_index, token_offsets, score, int(divides), scale)
    return score


@fake(slot_scores)
def _(
    logits: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor,
    scoring: str,
    renormalize: bool,
    scale: float,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    return torch.empty_like(expert_index, dtype=torch.float32)


@operator("sonicmoe_routing::slot_scores_grad")
def slot_scores_grad(
    logits: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor | None,
    score_grad: torch.Tensor,
    slots_per_token: int,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    """(T, E) the gradient of the scores in the logits, in their dtype; the slots are t * K + j where token_offsets is None."""
    logits_grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits_grad.numel() == 0:
        return logits_grad
    if expert_index.shape[0] == 0:
        return logits_grad.zero_()
    kernel, numbers = grad_launch_of(logits.dtype, token_offsets is None, slots_per_token, scoring, renormalize, scale)
    with cute_runtime.on_device(logits.device):
        kernel(logits.contiguous(), expert_index, token_offsets, score_grad.float().contiguous(), logits_grad, *numbers)
    return logits_grad


def grad_launch_of(
    dtype: torch.dtype, uniform: bool, slots_per_token: int, scoring: str, renormalize: bool, scale: float
) -> tuple[Callable[..., None], tuple[int, int, float]]:
    """The kernel, launched as (logits, expert_index, token_offsets | None, score_grad, logits_grad, *numbers), and its numbers."""
    divides = renormalize and scoring != "softmax_topk"
    return _grad_kernel(dtype, uniform, scoring), (slots_per_token, int(divides), float(scale))


@fake(slot_scores_grad)
def _(
    logits: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor | None,
    score_grad: torch.Tensor,
    slots_per_token: int,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator("sonicmoe_routing::slot_scores_grad_again")
def slot_scores_grad_again(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor | None,
    score_grad: torch.Tensor,
    slots_per_token: int,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    """The same (T, E) for the logits ``x @ weight.T``, made here. One operator: torch.compile would keep a product of its own."""
    return slot_scores_grad(linear(x, weight), expert_index, token_offsets, score_grad, slots_per_token, scoring, renormalize, scale)


@fake(slot_scores_grad_again)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    expert_index: torch.Tensor,
    token_offsets: torch.Tensor | None,
    score_grad: torch.Tensor,
    slots_per_token: int,
    scoring: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(torch.promote_types(x.dtype, weight.dtype)))


not_differentiable(slot_scores_grad_again, "routing's scores")


def score_grad_of(
    logits: torch.Tensor | None, x: torch.Tensor | None, weight: torch.Tensor | None, expert_index: torch.Tensor, *arguments
) -> torch.Tensor:
    """slot_scores_grad by what was kept: the logits, or their origin."""
    if logits is None:
        return slot_scores_grad_again(x, weight, expert_index, *arguments)
    return slot_scores_grad(logits, expert_index, *arguments)


def _setup_context(ctx, inputs, output) -> None:
    logits, expert_index, token_offsets, *ctx.settings, x, weight = inputs
    ctx.save_for_backward(logits if x is None else None, x, weight, expert_index, token_offsets)


def _backward(ctx, score_grad: torch.Tensor):
    return score_grad_of(*ctx.saved_tensors, score_grad, 0, *ctx.settings), *(None,) * 7


differentiable(slot_scores, _backward, _setup_context)


@functools.cache
def _scores_kernel(scoring: str) -> Callable[..., None]:
    return cute_runtime.load(variants.slot_scores(scoring=scoring))


@functools.cache
def _grad_kernel(dtype: torch.dtype, uniform: bool, scoring: str) -> Callable[..., None]:
    return cute_runtime.load(variants.slot_scores_grad(dtype=DTYPE_NAME[dtype], form="uniform" if uniform else "csr", scoring=scoring))
