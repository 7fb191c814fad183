"""A layer cell: routing and dispatch at its own sizes, then its experts, forward and all gradients, against the oracle.

T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from routing import Routing
from sonicmoe import accuracy, oracle, routed_experts, router
from testing.matrix.cells import LayerCell, Profile, RoutingSpec
from testing.matrix.checks_routing import finite
from testing.matrix.inputs import router_logits, selection_bias
from testing.matrix.plan import UNGATED, experts_problem
from testing.matrix.results import Check, check
from testing.matrix.route import check_route, route, with_sentinels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Problem(NamedTuple):
    """The inputs of one layer: parameters, tokens, what is added to the router's logits, and the output's gradient."""

    x: torch.Tensor
    router_weight: torch.Tensor
    parameters: dict[str, torch.Tensor]
    """w_up, w_down and, with biases, b_up, b_down."""
    added_logits: torch.Tensor | None
    """(T, E) float32, not finite where the load says so; None under the normal load."""
    bias: torch.Tensor | None
    """(E,) of the choice."""
    dout: torch.Tensor
    spec: RoutingSpec
    per_token: int
    seed: int


def measure_layer(cell: LayerCell, profile: Profile, seed: int, device: str) -> dict[str, Any]:
    """Checks and errors of one layer cell, as its result's fields."""
    full = cell.thiek
    checks = check_route(
        cell.routing, cell.load, full.T, full.E, full.K, seed, device, counts=cell.counts, sentinels=cell.sentinels
    )  # fmt: skip
    problem = make_problem(cell, profile, seed, device)
    with poisoned():
        first = run_layer(cell, problem)
    expected = run_oracle(cell, problem)
    errors = accuracy.measure_all(first, expected)
    with torch.no_grad(), poisoned():
        inference, _ = _forward(cell, problem, problem.x, problem.router_weight, problem.parameters)
    errors["o"] = max(errors["o"], accuracy.measure("o", inference, expected["o"]), key=lambda error: error.worst_block)
    checks.append(check_repeats(cell, problem, first, cell.repeats or profile.repeats))
    return {
        "checks": [item._asdict() for item in checks],
        "errors": {name: {"whole": _json(error.whole), "worst_block": _json(error.worst_block)} for name, error in errors.items()},
    }


def check_repeats(cell: LayerCell, problem: Problem, first: dict[str, torch.Tensor], repeats: int) -> Check:
    """Do all runs on the same inputs give the first one's bits? A race that shows in one run of ten hides from 100 with 3e-5."""
    different: Counter[str] = Counter()
    for _ in range(repeats - 1):
        again = run_layer(cell, problem)
        different.update(name for name in first if not _same_bits(first[name], again[name]))
    found = ", ".join(f"{name} in {count}" for name, count in different.items())
    return check("same bits", not different, f"other bits than in the first run: {found} of {repeats - 1} runs")


def _json(value: float) -> float | None:
    """JSON has no infinity; None is judged as not finite."""
    return value if math.isfinite(value) else None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise equality, in which a NaN equals itself and -0 is not 0."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def make_problem(cell: LayerCell, profile: Profile, seed: int, device: str) -> Problem:
    """Inputs at the profile's sizes, scaled so that every tensor along the way has about unit variance.

    Under the normal load the router decides by its weight. Under the others its weight is zero and the load's logits are
    added, so that they decide; its gradient is measured all the same.
    """
    (T, H, I, E, K), spec = experts_problem(cell, profile.limits)
    dtype = DTYPES[cell.dtype]
    # On the device: a layer of three billion weights would keep a core busy for half a minute.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    up_rows = I if cell.activation in UNGATED else 2 * I
    parameters = {"w_up": normal(E, up_rows, H, scale=H**-0.5), "w_down": normal(E, H, I, scale=I**-0.5)}
    if cell.bias:
        parameters |= {"b_up": normal(E, up_rows), "b_down": normal(E, H)}
    router_weight = normal(E, H, scale=H**-0.5)
    added = None
    if cell.load != "normal" or cell.counts is not None:
        router_weight.zero_()
        added = torch.from_numpy(router_logits(cell.load, T, E, seed, cell.counts)).to(device)
    bias = selection_bias(spec, E, seed)
    bias_tensor = None if bias is None else torch.from_numpy(bias).to(device)
    return Problem(normal(T, H), router_weight, parameters, added, bias_tensor, normal(T, H), spec, K, seed)


def _logits(problem: Problem, logits: torch.Tensor) -> torch.Tensor:
    """(T, E) the router's logits with the problem's added; where those are not finite they replace the router's."""
    if problem.added_logits is None:
        return logits
    added = problem.added_logits.to(logits.dtype)
    return torch.where(added.isfinite(), logits + added, added)


def _forward(
    cell: LayerCell, problem: Problem, x: torch.Tensor, router_weight: torch.Tensor, parameters: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, Routing]:
    logits = _logits(problem, router.router_logits(x, router_weight))
    origin = (x, router_weight) if problem.added_logits is None else None
    routed = route(logits, problem.per_token, problem.spec, problem.bias, problem.seed, origin)
    routed = with_sentinels(routed, cell.sentinels, problem.seed)
    o = routed_experts(x, routing=routed, activation=cell.activation, gate_up_layout=cell.layout, **parameters)
    return o, routed


def run_layer(cell: LayerCell, problem: Problem) -> dict[str, torch.Tensor]:
    """The layer under test: o, dx, drouter and the gradient of every parameter, in the cell's dtype."""
    leaves = {"x": problem.x, "router": problem.router_weight, **problem.parameters}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
    o, _ = _forward(cell, problem, leaves["x"], leaves["router"], {name: leaves[name] for name in problem.parameters})
    gradients = torch.autograd.grad(o, list(leaves.values()), problem.dout)
    return {"o": o.detach(), **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def run_oracle(cell: LayerCell, problem: Problem) -> dict[str, torch.Tensor]:
    """The same in float64 for the same routing: scores follow anew from the logits, the choice is taken over.

    The choice is made from the layer's own logits, whose operands are not rounded either, in the same float32 products.
    """
    logits32 = _logits(problem, router.router_logits(problem.x, problem.router_weight))
    chosen = route(logits32, problem.per_token, problem.spec, problem.bias, problem.seed)
    x, router_weight = (tensor.detach().double().requires_grad_() for tensor in (problem.x, problem.router_weight))
    logits = _logits(problem, F.linear(x, router_weight))
    lowest, highest = (float(value) for value in finite(np.array([-np.inf, np.inf])))
    logits = logits.nan_to_num(nan=lowest, posinf=highest, neginf=lowest)
    score = oracle.scores(
        logits, chosen, scoring=problem.spec.scoring, renormalize=problem.spec.renormalize, scale=problem.spec.scale
    )  # fmt: skip
    routed = with_sentinels(chosen._replace(score=score), cell.sentinels, problem.seed)
    result = oracle.experts(
        problem.x,
        problem.parameters["w_up"],
        problem.parameters["w_down"],
        routed,
        problem.dout,
        b_up=problem.parameters.get("b_up"),
        b_down=problem.parameters.get("b_down"),
        activation=cell.activation,
        gate_up_layout=cell.layout,
    )
    oracle.through_router(result, routed.score, logits, x, router_weight)
    return result


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that PyTorch allocates without filling holds NaN (the largest integer, for integers).

    An output row that nothing wrote then shows as NaN instead of a lucky leftover.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill_before
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
