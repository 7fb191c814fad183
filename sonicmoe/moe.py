"""The Mixture-of-Experts layer. Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token."""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import nn

from routing import RouterConfig, Routing, expert_counts, load_balance_loss, router_z_loss
from routing.recomputed import Origin
from sonicmoe import at_once, backends, validation
from sonicmoe.activations import is_gated
from sonicmoe.experts import routed_experts
from sonicmoe.router import Router

EXPERT_PARAMETERS = ("w_up", "w_down", "b_up", "b_down")
"""The parameters whose first dimension is the experts."""


class RouterOutput(NamedTuple):
    """What the router decided, for auxiliary losses and monitoring."""

    logits: torch.Tensor
    """(T, E) float32 (float64 for a float64 layer)."""
    routing: Routing
    counts: torch.Tensor
    """(E,) int32, the rows of each expert."""
    load_balance_loss: torch.Tensor
    """Scalar, see `routing.load_balance_loss`."""
    z_loss: torch.Tensor
    """Scalar, see `routing.router_z_loss`."""


class Parallelism(Protocol):
    """What takes the place of a layer's own work where its experts are spread over processes: see `sonicmoe.parallel`."""

    def local(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
        """This process's part of a parameter of the experts, differentiable."""

    def route(
        self, config: RouterConfig, logits: torch.Tensor, selection_bias: torch.Tensor | None, origin: Origin | None = None
    ) -> Routing:
        """In place of ``config.route``."""

    def routed_experts(
        self,
        x: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
        routing: Routing,
        *,
        meanwhile: Callable[[], torch.Tensor] | None,
        **options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In place of `sonicmoe.routed_experts`; also the result of ``meanwhile``, called while tokens travel."""

    def router_output(self, config: RouterConfig, logits: torch.Tensor, routing: Routing) -> RouterOutput:
        """In place of the layer's own."""


class MoE(nn.Module):
    """Tokens (..., H) -> (..., H): a router picks each token's experts, and their outputs are summed, weighted by its scores.

    Forward: logits = x @ router.weight.T in float32; routing by ``router_config``; `routed_experts`.

    Under autocast, x, weights and biases are cast to autocast's dtype, which is then the output's; the router's logits are float32
    always. Otherwise x must have the weights' dtype.

    Args:
        hidden_size: H, a multiple of 8.
        intermediate_size: I, a multiple of 8.
        num_experts: E.
        num_experts_per_tok: K, at most E.
        activation: swiglu, geglu, reglu, swiglu_oai (gated), silu, gelu, relu or relu_squared.
        bias: whether the experts' two projections have biases.
        gate_up_layout: "interleaved" or "concatenated", see `routed_experts`.
        router: how logits become a routing, with the same K; top-K over a softmax by default. May be replaced later through
            the attribute ``router_config``.
        selection_bias: whether the router has a bias that takes part in the choice of experts only.
        backend: "auto", "hopper" or "reference".
        main_grads: whether backward adds the gradients of w_up and w_down to these parameters' attribute ``main_grad``, a float32
            tensor of the same shape that the trainer provides, and leaves their ``grad`` alone; see `routed_experts`.
        device, dtype: of the parameters, as in any `torch.nn.Module`.

    Attributes:
        router: `Router` with weight (E, H).
        w_up: (E, 2I, H), or (E, I, H) for an activation without a gate.
        w_down: (E, H, I).
        b_up, b_down: (E, 2I) or (E, I), and (E, H); None without ``bias``.
        parallelism: None, or what spreads the experts over processes, set by `sonicmoe.parallel.expert_parallel`.

    Raises:
        ValueError, TypeError: an argument that cannot be, in one sentence.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        gate_up_layout: str = "interleaved",
        router: RouterConfig | None = None,
        selection_bias: bool = False,
        backend: str = "auto",
        main_grads: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        validation.check_options(activation, gate_up_layout, backend)
        validation.check_sizes(hidden_size, intermediate_size, num_experts, num_experts_per_tok)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        validation.check_dtype(dtype)
        router = RouterConfig(k=num_experts_per_tok) if router is None else router
        if not isinstance(router, RouterConfig):
            raise TypeError(f"router={router!r}: must be a routing.RouterConfig or None")
        router.validate(num_experts)
        if router.k != num_experts_per_tok:
            raise ValueError(f"router.k={router.k}: must be num_experts_per_tok={num_experts_per_tok}")
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.activation, self.gate_up_layout = activation, gate_up_layout
        self.router_config, self.backend, self.main_grads = router, backend, main_grads
        self.parallelism: Parallelism | None = None
        make = {"device": device, "dtype": dtype}
        up_rows = intermediate_size * (2 if is_gated(activation) else 1)
        self.router = Router(hidden_size, num_experts, selection_bias=selection_bias, **make)
        self.w_up = nn.Parameter(torch.empty(num_experts, up_rows, hidden_size, **make))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **make))
        self.register_parameter("b_up", nn.Parameter(torch.empty(num_experts, up_rows, **make)) if bias else None)
        self.register_parameter("b_down", nn.Parameter(torch.empty(num_experts, hidden_size, **make)) if bias else None)
        self._reset_experts()
        backends.prepare(backend, self.w_up.device, dtype)

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` for the router and each expert: weights and biases uniform within 1/sqrt(fan-in)."""
        self.router.reset_parameters()
        self._reset_experts()

    def _reset_experts(self) -> None:
        for weight, bias in ((self.w_up, self.b_up), (self.w_down, self.b_down)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self,
        x: torch.Tensor,
        *,
        return_router: bool = False,
        shared_expert: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, RouterOutput]:
        """(..., H) -> (..., H), with ``return_router`` also a RouterOutput.

        ``shared_expert`` maps all tokens (T, H) to (T, H), which is added to the output. Where the experts are spread over
        processes it runs while tokens travel.
        """
        shape = x.shape
        if not shape or shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {tuple(shape)}: must be (..., {self.hidden_size})")
        if not return_router and shared_expert is None and (out := at_once.output(self, x)) is not None:
            return out
        # Each access to a parameter of a module takes half a microsecond: one each.
        w_up, w_down, b_up, b_down, router = self.w_up, self.w_down, self.b_up, self.b_down, self.router
        device_type = x.device.type
        autocast = not x.is_meta and torch.is_autocast_enabled(device_type)
        if not autocast and x.dtype != w_up.dtype:
            raise TypeError(f"x has dtype {x.dtype}: must be the weights' {w_up.dtype} outside of autocast")
        parallel = self.parallelism
        if parallel is not None:
            # A DTensor that FSDP2 has gathered may call itself by another dtype than its local part still has.
            own = (None if tensor is None else parallel.local(tensor).to(tensor.dtype) for tensor in (w_up, w_down, b_up, b_down))
            w_up, w_down, b_up, b_down = own
        tokens = narrow = x if x.dim() == 2 else x.reshape(-1, self.hidden_size)
        if autocast:
            dtype = torch.get_autocast_dtype(device_type)
            casts = (None if tensor is None else tensor.to(dtype) for tensor in (tokens, w_up, w_down, b_up, b_down))
            narrow, w_up, w_down, b_up, b_down = casts
        options = {
            "b_up": b_up,
            "b_down": b_down,
            "activation": self.activation,
            "gate_up_layout": self.gate_up_layout,
            "backend": self.backend,
        }

        def shared() -> torch.Tensor:
            with torch.autocast(device_type) if autocast else contextlib.nullcontext():
                return shared_expert(tokens)

        with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
            logits = router(tokens)
            origin = router.origin(tokens) if torch.is_grad_enabled() and isinstance(router, Router) else None
            if parallel is None:
                if self.main_grads:
                    options["main_grads"] = self._main_grads()
                routing = self.router_config.route(logits, selection_bias=router.selection_bias, origin=origin)
                out = routed_experts(narrow, w_up, w_down, routing, **options)
                added = None if shared_expert is None else shared()
                router_output = self._router_output
            else:
                routing = parallel.route(self.router_config, logits, router.selection_bias, origin)
                meanwhile = None if shared_expert is None else shared
                out, added = parallel.routed_experts(narrow, w_up, w_down, routing, meanwhile=meanwhile, **options)
                router_output = partial(parallel.router_output, self.router_config)
            if added is not None:
                out = out + added
            if x.dim() != 2:
                # Not a view, as reshape's result would be: FSDP2 hooks the output, and an in-place operation on a view drops the hooks.
                out = torch.ops.aten._unsafe_view(out, x.shape)
            return (out, router_output(logits, routing)) if return_router else out

    def _main_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The buffers of the weights that need a gradient now."""
        found = []
        for name, weight in (("w_up", self.w_up), ("w_down", self.w_down)):
            needed = torch.is_grad_enabled() and weight.requires_grad
            if needed and getattr(weight, "main_grad", None) is None:
                raise ValueError(f"{name} has no main_grad: must be a float32 tensor of the weight's shape with main_grads=True")
            found.append(weight.main_grad if needed else None)
        return tuple(found)

    def _router_output(self, logits: torch.Tensor, routing: Routing) -> RouterOutput:
        balance = load_balance_loss(logits, routing, scoring=self.router_config.scoring)
        return RouterOutput(logits, routing, expert_counts(routing), balance, router_z_loss(logits))

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, num_experts={self.num_experts}, "
            f"num_experts_per_tok={self.num_experts_per_tok}, activation={self.activation}, bias={self.b_up is not None}, "
            f"gate_up_layout={self.gate_up_layout}, routing={self.router_config.method}, backend={self.backend}"
        )
