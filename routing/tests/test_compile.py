"""torch.compile traces every routing without a graph break and gives eager's values."""

import pytest
import torch

from dispatch import debug
from routing import Routing, expert_counts, load_balance_loss, router_z_loss, token_rounding, top_k, wasted_row_ratio
from routing.rounding import MODES, rounded_counts
from routing.scoring import largest


def observe(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, ...]:
    counts = expert_counts(routing)
    return *routing[:3], counts, wasted_row_ratio(counts, 8), load_balance_loss(logits, routing) + router_z_loss(logits)


@pytest.mark.parametrize("mode", [None, "balanced"])
def test_compiled_with_fullgraph_gives_eager_values_and_gradients(mode: str | None) -> None:
    options = {"scoring": "sigmoid", "renormalize": True, "num_groups": 4, "groups_per_token": 2}

    def route(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if mode is None:
            return observe(logits, top_k(logits, 3, selection_bias=bias, **options))
        return observe(logits, token_rounding(logits, 3, 8, mode, selection_bias=bias, **options))

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (50, 31):
        logits = torch.randn(num_tokens, 16, requires_grad=True)
        results = []
        for function in (route, compiled):
            outputs = function(logits, torch.linspace(-0.1, 0.1, 16))
            results.append((*outputs, *torch.autograd.grad(outputs[2].square().sum() + outputs[5], logits)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_every_rounding_compiles_with_fullgraph(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rounded_counts, fullgraph=True, dynamic=True, backend="aot_eager")
    counts = torch.arange(100)
    results = []
    for function in (rounded_counts, compiled):
        torch.manual_seed(0)
        results.append(function(counts, 90, 8, mode))
    assert torch.equal(*results)


def test_debug_switch_works_in_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda logits: top_k(logits, 1).score, fullgraph=True, backend="aot_eager")
    bad = torch.full((2, 3), float("nan"))
    assert compiled(bad).isfinite().all()
    with debug.checks(), pytest.raises(RuntimeError, match="logits: must be finite"):
        compiled(bad)


@pytest.mark.parametrize("value", [torch.randn(6, 4), torch.randn(2, 3, 5, dtype=torch.float64), torch.empty(0, 4)])
def test_operator_passes_the_checks_of_torch_library(value: torch.Tensor) -> None:
    torch.library.opcheck(largest.op, (value, 2))
