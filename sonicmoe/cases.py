"""Random problems to test and to time: inputs, parameters and an output gradient for one layer.

All values are normally distributed, and weights are scaled so that z, y and o are of order one in every activation and routing:
data of order one does not hide in underflow, and random normal data draws the power that real data draws.
Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from routing import RouterConfig, Routing
from routing.linalg import linear
from sonicmoe import names, oracle
from sonicmoe.activations import activate, is_gated
from sonicmoe.moe import MoE
from sonicmoe.thiek import Thiek
from sonicmoe.validation import check_dtype, check_options, check_sizes

DTYPES = {name: getattr(torch, dtype) for name, dtype in names.DTYPES.items()}
"""By the names that commands and recorded results use."""


@dataclass(frozen=True)
class Case:
    """One layer's problem."""

    thiek: Thiek
    router: RouterConfig
    activation: str
    gate_up_layout: str
    x: torch.Tensor
    """(T, H)."""
    router_weight: torch.Tensor
    """(E, H)."""
    w_up: torch.Tensor
    w_down: torch.Tensor
    b_up: torch.Tensor | None
    b_down: torch.Tensor | None
    dout: torch.Tensor
    """(T, H) gradient of the output."""

    def layer(self, backend: str = "auto") -> MoE:
        """The layer; its parameters share memory with the case's tensors."""
        _, H, I, E, K = self.thiek
        with torch.device("meta"):
            layer = MoE(
                H,
                I,
                E,
                K,
                activation=self.activation,
                bias=self.b_up is not None,
                gate_up_layout=self.gate_up_layout,
                router=self.router,
                backend=backend,
                dtype=self.x.dtype,
            )
        names = [name for name in ("w_up", "w_down", "b_up", "b_down") if getattr(self, name) is not None]
        state = {"router.weight": self.router_weight} | {name: getattr(self, name) for name in names}
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_()

    def oracle(self, routing: Routing) -> dict[str, torch.Tensor]:
        """What `run` should have returned, in float64, for the routing that it used: see `sonicmoe.oracle.layer`."""
        return oracle.layer(
            self.x,
            self.router_weight,
            self.w_up,
            self.w_down,
            routing,
            self.dout,
            scoring=self.router.scoring,
            renormalize=self.router.renormalize,
            scale=self.router.scale,
            b_up=self.b_up,
            b_down=self.b_down,
            activation=self.activation,
            gate_up_layout=self.gate_up_layout,
        )

    def with_fresh_tokens(self, seed: int) -> "Case":
        """The same experts with other tokens, output gradient and router."""
        draw = _Draw(seed, self.x.device, self.x.dtype)
        return replace(self, **_tokens(draw, self.thiek))


def make_case(
    thiek: Thiek,
    *,
    seed: int,
    router: RouterConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    activation: str = "swiglu",
    bias: bool = False,
    gate_up_layout: str = "interleaved",
) -> Case:
    """Draw a problem; the same arguments on the same kind of device give the same values.

    Raises:
        ValueError, TypeError: sizes or options that no layer can have.
    """
    T, H, I, E, K = thiek
    check_options(activation, gate_up_layout, "auto")
    check_sizes(H, I, E, K)
    check_dtype(dtype)
    router = RouterConfig(k=K) if router is None else router
    router.validate(E)
    draw = _Draw(seed, torch.device(device), dtype)
    tokens = _tokens(draw, thiek)
    up_rows = I * (2 if is_gated(activation) else 1)
    sample = torch.randn(4096, 2 if is_gated(activation) else 1, generator=torch.Generator().manual_seed(0))
    a_scale = activate(sample, activation, "interleaved").square().mean().sqrt().item()
    with torch.no_grad():
        score = router.route(linear(tokens["x"], tokens["router_weight"])).score
    score_scale = math.sqrt(score.square().sum().item() / max(T, 1)) or 1.0
    return Case(
        thiek,
        router,
        activation,
        gate_up_layout,
        **tokens,
        w_up=draw(E, up_rows, H, scale=1 / math.sqrt(H)),
        w_down=draw(E, H, I, scale=1 / (a_scale * score_scale * math.sqrt(I))),
        b_up=draw(E, up_rows, scale=0.5) if bias else None,
        b_down=draw(E, H, scale=0.5 / score_scale) if bias else None,
    )


def run(layer: MoE, case: Case) -> tuple[dict[str, torch.Tensor], Routing]:
    """One forward and backward pass: o, dx, dw_up, dw_down, drouter, with biases db_up and db_down; and the routing used."""
    x = case.x.detach().requires_grad_()
    names = {"w_up": "dw_up", "w_down": "dw_down", "b_up": "db_up", "b_down": "db_down", "router.weight": "drouter"}
    parameters = dict(layer.named_parameters())
    out, router = layer(x, return_router=True)
    gradients = torch.autograd.grad(out, [x, *parameters.values()], case.dout)
    result: dict[str, torch.Tensor] = {"o": out.detach(), "dx": gradients[0]}
    result |= {names[name]: gradient for name, gradient in zip(parameters, gradients[1:], strict=True)}
    return result, Routing(*(value.detach() if isinstance(value, torch.Tensor) else value for value in router.routing))


def memory_bytes(thiek: Thiek, *, dtype: torch.dtype, activation: str, test: bool) -> int:
    """An upper estimate of what making, running and timing a case takes, with ``test`` also judging it by the oracle."""
    T, H, I, E, _ = thiek
    Z, rows, size = I * (2 if is_gated(activation) else 1), thiek.rows, dtype.itemsize
    weights = E * H * (Z + I)
    training = size * (2 * weights + 4 * T * H + rows * (2 * Z + 2 * I + 2 * H)) + 16 * rows
    bound = size * (weights + rows * (Z + I + 2 * H) + weights // E)
    float64 = 8 * (weights + 3 * weights // E + 4 * T * H + 4 * T * E + 4 * min(rows, T) * (H + Z)) if test else 0
    widened = 4 * (2 * weights // E + 3 * min(rows, T) * (H + Z))
    return int(1.1 * (training + max(bound, float64 + widened)))


class _Draw:
    """Normal numbers from one seed, drawn in the dtype and on the device that they are for."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.make: dict[str, Any] = {"device": device, "dtype": dtype}

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, **self.make).mul_(scale)


def _tokens(draw: _Draw, thiek: Thiek) -> dict[str, torch.Tensor]:
    T, H, _, E, _ = thiek
    return {"x": draw(T, H), "dout": draw(T, H), "router_weight": draw(E, H, scale=1 / math.sqrt(H))}
