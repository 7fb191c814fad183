"""The router's weight and its logits. Notation: T tokens, H hidden size, E experts."""

import math

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dispatch.operators import differentiable, fake, not_differentiable, operator, without_autocast
from routing.linalg import accumulation_dtype, bfloat16_pair, linear, matmul


class Router(nn.Module):
    """Tokens (T, H) -> logits (T, E) in float32 (float64 for float64), whatever the weight's dtype.

    Attributes:
        weight: (E, H).
        selection_bias: (E,) float32 buffer, zeros at first, or None. It is added to the scores for the choice of experts only and
            gets no gradient; training code moves it to balance the load (DeepSeek-V3, arXiv 2408.15664).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear`: uniform within 1/sqrt(H); the selection bias is zero."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return router_logits(x, self.weight)

    def origin(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(x, weight) where calling this module with x gives `routing.linalg.linear` of just these, else None. See `routing.top_k`."""
        return None if self.is_watched() else (x, self.weight)

    def is_watched(self) -> bool:
        """Whether someone's hook, another forward, a parametrization or a subclass may have its say when this module is called."""
        hooked = self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__ or _has_any_global_hook()
        return bool(hooked) or type(self) is not Router

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, selection_bias={self.selection_bias is not None}"


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` in float32 (float64 for float64): x (T, H), weight (E, H) -> (T, E). Differentiable once in both.

    Forward: 16-bit operands are multiplied as they are, summed in float32 and not rounded: on a GPU by the matrix units without a
    float32 copy of x (on an sm_90 GPU in a kernel of ours, see `routing.linalg.linear`), elsewhere through one. Operands of different
    dtypes are widened to float32 first.

    Backward: dx is rounded once to x's dtype, dweight is summed in float32 and rounded once to weight's. Of the logits' float32
    gradient, bfloat16 operands on a GPU see the sum of two bfloat16 values, `routing.linalg.bfloat16_pair`; everything else is multiplied
    in float32.

    Autocast does not reach inside. Judged against `sonicmoe.oracle.layer`, which multiplies the same operands in float64.
    """
    return _logits(x, weight)


_logits = operator("sonicmoe::router_logits")(linear)


@fake(_logits)
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(torch.promote_types(x.dtype, weight.dtype)))


@operator("sonicmoe::router_logits_grad")
def router_logits_grad(
    dlogits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (T, H) and dweight (E, H); an empty tensor for what is not needed."""
    with without_autocast(x.device):
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            dx, dweight = _paired_grad(dlogits, x, weight, need_x, need_weight)
        else:
            dx = matmul(dlogits, weight).to(x.dtype) if need_x else None
            dweight = matmul(dlogits.mT, x).to(weight.dtype) if need_weight else None
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dweight is None else dweight


def _paired_grad(
    dlogits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same from dlogits as a pair: ``dx = [high low] @ [weight; weight]`` in one product, so that it is rounded once."""
    dx = dweight = None
    pair = bfloat16_pair(dlogits)
    if need_x:
        dx = torch.mm(pair, torch.cat((weight, weight)))
    if need_weight:
        high, low = matmul(pair.mT, x).chunk(2)
        dweight = (high + low).to(weight.dtype)
    return dx, dweight


@fake(router_logits_grad)
def _(dlogits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dlogits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    needs = ctx.needs_input_grad
    gradients = router_logits_grad(dlogits, *ctx.saved_tensors, *needs)
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


differentiable(_logits, _backward, _setup_context)
not_differentiable(router_logits_grad, "router_logits")
