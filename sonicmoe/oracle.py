"""The layer in float64 with PyTorch's own functions and autograd: what every result is judged against.

It shares no code with the backends: one expert after the other, gradients by autograd, no dispatch plan. The same low-precision
inputs and the same routing (who goes where) go in; scores are computed anew in float64.
Notation: T tokens, H hidden size, I intermediate size, E experts, R routed slots.

dscore and drouter are sums of dot products with the output's gradient. One of few terms may nearly cancel by chance, and relative to
itself it is then all rounding. So these come with their sizes, which cannot cancel: the root mean square over random signs of the terms,
times 1 + 4 / R, for of few roundings one stands out. `sonicmoe.accuracy.measure` judges by them.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from routing import Routing

SIGNS = 8
"""Draws of signs for the size of the router's gradient."""


def _swiglu_oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gpt-oss: the gate at most 7, up within 7 of 0, ``gate / (1 + exp(-1.702 gate))`` times ``up + 1``."""
    gate, up = torch.minimum(gate, gate.new_tensor(7.0)), F.hardtanh(up, -7.0, 7.0)
    return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)


_GATED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "swiglu_oai": _swiglu_oai,
}
_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "relu_squared": lambda z: F.relu(z) ** 2,
}


def experts(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    dout: torch.Tensor,
    *,
    score: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    activation: str = "swiglu",
    gate_up_layout: str = "interleaved",
) -> dict[str, torch.Tensor]:
    """The routed experts' output and all gradients, for the output's gradient ``dout`` (T, H).

    Args:
        x, w_up, w_down, routing, b_up, b_down, activation, gate_up_layout: as in `sonicmoe.routed_experts`.
        score: (R,) to use in place of ``routing.score``.

    Returns:
        o (T, H), dx (T, H), dw_up, dw_down, db_up and db_down where there are biases, dscore (R,) and "dscore size" (R,); all float64.
    """
    x, dout = x.detach().double(), dout.detach().double()
    score = (routing.score if score is None else score).detach().double()
    biases = {name: bias for name, bias in (("db_up", b_up), ("db_down", b_down)) if bias is not None}
    result = {name: torch.zeros_like(x) for name in ("o", "dx")}
    for name, parameter in {"dw_up": w_up, "dw_down": w_down, **biases}.items():
        result[name] = torch.zeros_like(parameter, dtype=torch.float64, memory_format=torch.contiguous_format)
    result["dscore"], result["dscore size"] = torch.zeros_like(score), torch.zeros_like(score)
    slots_by_expert = _slots_by_expert(routing.expert_index, len(w_up))
    few = 1 + 4 / max(sum(map(len, slots_by_expert)), 1)
    for expert, slots in enumerate(slots_by_expert):
        if not len(slots):
            continue
        tokens = routing.tokens()[slots].long()
        leaves = {"x": x[tokens], "dscore": score[slots], "dw_up": w_up[expert], "dw_down": w_down[expert]}
        leaves |= {name: bias[expert] for name, bias in biases.items()}
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():
            z = F.linear(leaves["x"], leaves["dw_up"], leaves.get("db_up"))
            y = F.linear(_activate(z, activation, gate_up_layout), leaves["dw_down"], leaves.get("db_down"))
            rows = leaves["dscore"][:, None] * y
            gradients = dict(zip(leaves, torch.autograd.grad(rows, list(leaves.values()), dout[tokens]), strict=True))
        result["o"].index_add_(0, tokens, rows.detach())
        result["dx"].index_add_(0, tokens, gradients.pop("x"))
        result["dscore"][slots] = gradients.pop("dscore")
        result["dscore size"][slots] = few * (y.detach() * dout[tokens]).norm(dim=1)
        for name, gradient in gradients.items():
            result[name][expert] = gradient
    return result


def layer(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    routing: Routing,
    dout: torch.Tensor,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    **expert_arguments,
) -> dict[str, torch.Tensor]:
    """`experts` behind a router: drouter (E, H) and "drouter size" (E,) in place of dscore's, and dx through both.

    The logits are the float64 product of the same operands: `sonicmoe.router.router_logits` rounds neither them nor, before float32,
    the result.

    Args:
        router_weight: (E, H); logits are ``x @ router_weight.T``.
        routing: tells who goes where; its scores are not used.
        scoring, renormalize, scale: how scores follow from logits, as in `routing.top_k`.
        expert_arguments: b_up, b_down, activation, gate_up_layout of `experts`.
    """
    x64 = x.detach().double().requires_grad_()
    weight64 = router_weight.detach().double().requires_grad_()
    with torch.enable_grad():
        logits = F.linear(x64, weight64)
        score = scores(logits, routing, scoring=scoring, renormalize=renormalize, scale=scale)
    result = experts(x, w_up, w_down, routing, dout, score=score, **expert_arguments)
    through_router(result, score, logits, x64, weight64)
    return result


def through_router(
    result: dict[str, torch.Tensor], score: torch.Tensor, logits: torch.Tensor, x: torch.Tensor, router_weight: torch.Tensor
) -> None:
    """Go on from dscore in the result of `experts` to drouter and dx, through a graph that makes score of logits, and these of x.

    A score that hardly depends on the logits, as that of one expert divided by itself, is the difference of terms of order one, worked out
    in float32: its derivative counts as at least 1e-3.
    """
    size, token_squares = result.pop("dscore size"), x.detach().square().sum(dim=1)
    terms = size.square().sum() * token_squares.sum() / max(len(x), 1)
    squares = (1e-6 * terms / logits.shape[1]).repeat(logits.shape[1])
    generator = torch.Generator(size.device).manual_seed(0)
    for _ in range(SIGNS):
        signs = torch.randint(2, size.shape, generator=generator, device=size.device) * 2 - 1
        (dlogits,) = torch.autograd.grad(score, logits, size * signs, retain_graph=True)
        squares += token_squares @ dlogits.square_() / SIGNS
    result["drouter size"] = squares.sqrt()
    dx, result["drouter"] = torch.autograd.grad(score, (x, router_weight), result.pop("dscore"))
    result["dx"] += dx


def scores(logits: torch.Tensor, routing: Routing, *, scoring: str, renormalize: bool, scale: float) -> torch.Tensor:
    """(R,) the scores that ``logits`` (T, E) give the routing's slots, 0 for sentinels; differentiable.

    "softmax" is over all E experts, "softmax_topk" over the experts that the token goes to, "sigmoid" is elementwise;
    ``renormalize`` divides by the token's sum.
    """
    num_experts = logits.shape[1]
    live = (routing.expert_index >= 0) & (routing.expert_index < num_experts)
    tokens = torch.where(live, routing.tokens(), 0).long()
    slots = torch.where(live, routing.expert_index, 0).long()
    if not len(logits):
        return logits.new_zeros(len(slots)) + logits.sum()
    every = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(dim=1)
    values = torch.where(live, every[tokens, slots], 0.0)
    if renormalize or scoring == "softmax_topk":
        sums = values.new_zeros(len(logits)).index_add(0, tokens, values)[tokens]
        values = values / torch.where(live, sums, 1.0)
    return values * scale


def _slots_by_expert(expert_index: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """The slots of each expert, ascending."""
    order = expert_index.long().sort(stable=True)
    ends = torch.searchsorted(order.values, torch.arange(num_experts + 1, device=expert_index.device)).tolist()
    return [order.indices[begin:end] for begin, end in itertools.pairwise(ends)]


def _activate(z: torch.Tensor, activation: str, gate_up_layout: str) -> torch.Tensor:
    if activation in _PLAIN:
        return _PLAIN[activation](z)
    if gate_up_layout == "interleaved":
        gate, up = z.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        gate, up = z.chunk(2, dim=-1)
    return _GATED[activation](gate, up)
