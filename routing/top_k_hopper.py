"""Host half of kernels/top_k.py. Notation: T tokens, E experts, K experts per token, R = T * K slots."""

import functools
from collections.abc import Callable

import torch

import cute_runtime
from dispatch.operators import differentiable, fake, operator
from routing.hopper import DTYPE_NAME
from routing.kernels import variants
from routing.scores_hopper import score_grad_of


@operator("sonicmoe_routing::top_k")
def top_k_hopper(
    logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    num_groups: int,
    groups_per_token: int,
    group_score: str,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`routing.top_k` in one launch on the current stream: token_index, expert_index (R,) int32 and score (R,) float32.

    The arguments are top_k's, checked by it, and within the limits of routing/hopper.py. Differentiable in the logits through score;
    expert_index is kept for that, and the logits, or in their place x (T, H) and weight (E, H), their origin where it is given.
    """
    num_tokens = logits.shape[0]
    if num_tokens * k > cute_runtime.INT32_ELEMENTS:
        raise ValueError(f"logits: shape {tuple(logits.shape)}: T * k={num_tokens * k} must be at most {cute_runtime.INT32_ELEMENTS}")
    token_index, expert_index, score = _outputs(logits, k)
    if num_tokens:
        if selection_bias is not None:
            selection_bias = selection_bias.float().contiguous()
        settings = (k, scoring, renormalize, scale, num_groups, groups_per_token, group_score)
        kernel, numbers = launch_of(logits.dtype, logits.shape[1], selection_bias is not None, *settings)
        with cute_runtime.on_device(logits.device):
            kernel(logits.contiguous(), selection_bias, token_index, expert_index, score, *numbers)
    return token_index, expert_index, score


@fake(top_k_hopper)
def _(
    logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    num_groups: int,
    groups_per_token: int,
    group_score: str,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(logits, k)


def _outputs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_index = logits.new_empty(logits.shape[0] * k, dtype=torch.int32)
    return token_index, torch.empty_like(token_index), torch.empty_like(token_index, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros in place of the indices' gradients
    logits, _, ctx.k, ctx.scoring, ctx.renormalize, ctx.scale, _, _, _, x, weight = inputs
    ctx.save_for_backward(logits if x is None else None, x, weight, output[1])


def _backward(ctx, token_index_grad: None, expert_index_grad: None, score_grad: torch.Tensor):
    if score_grad is None:
        return (None,) * 11
    grad = score_grad_of(*ctx.saved_tensors, None, score_grad, ctx.k, ctx.scoring, ctx.renormalize, ctx.scale)
    return grad, *(None,) * 10


differentiable(top_k_hopper, _backward, _setup_context)


@functools.lru_cache(maxsize=1024)
def launch_of(
    dtype: torch.dtype,
    num_experts: int,
    biased: bool,
    k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    num_groups: int,
    groups_per_token: int,
    group_score: str,
) -> tuple[Callable[..., None], tuple[int | float, ...]]:
    """The kernel, launched as (logits, selection_bias | None, token_index, expert_index, score, *numbers), and its numbers."""
    by = "logit"
    if biased:
        by = "bias"
    elif scoring != "softmax_topk" and num_groups > 1 and group_score == "top2":
        by = "score"
    divides = renormalize and scoring != "softmax_topk"
    numbers = (k, num_groups, num_experts // num_groups, groups_per_token, int(group_score == "top2"), int(divides), float(scale))
    return _kernel(dtype, scoring, by), numbers


@functools.cache
def _kernel(dtype: torch.dtype, scoring: str, by: str) -> Callable[..., None]:
    return cute_runtime.load(variants.top_k(dtype=DTYPE_NAME[dtype], scoring=scoring, by=by))
