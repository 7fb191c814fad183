"""The router's weight and its logits. Notation: T tokens, H hidden size, E experts."""

import math

import torch
from torch import nn

from sonicmoe.linalg import matmul


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
        return _RouterLogits.apply(x, self.weight)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, selection_bias={self.selection_bias is not None}"


class _RouterLogits(torch.autograd.Function):
    """x @ weight.T in float32. A plain ``F.linear(x.float(), ...)`` would keep a float32 copy of x for backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return matmul(x, weight.mT)

    @staticmethod
    def backward(ctx, dlogits):
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = matmul(dlogits, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
            dweight = matmul(dlogits.mT, x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight
