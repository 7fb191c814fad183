"""torch.compile traces dispatch without a graph break; the fake implementations tell the truth."""

import os
import subprocess
import sys

import pytest
import torch

from dispatch import count_cumsum, gather_sum, plan


def dispatch_and_sum(token: torch.Tensor, expert: torch.Tensor, rows: torch.Tensor, score: torch.Tensor) -> tuple[torch.Tensor, ...]:
    p = plan(token, expert, num_tokens=6, num_experts=5)
    count, cumsum = count_cumsum(expert, 5)
    return gather_sum(rows, score, p), count, cumsum, *p[:6]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_fullgraph_gives_eager_values_and_gradients(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dispatch_and_sum, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for slots in (20, 13):
        generator = torch.Generator().manual_seed(slots)
        token = torch.randint(0, 6, (slots,), generator=generator)
        expert = torch.randint(-1, 6, (slots,), generator=generator)
        rows = torch.randn(slots, 8, generator=generator, requires_grad=True)
        score = torch.rand(slots, generator=generator, requires_grad=True)
        expected, got = dispatch_and_sum(token, expert, rows, score), compiled(token, expert, rows, score)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        gradients = [torch.autograd.grad(out[0].square().sum(), (rows, score)) for out in (expected, got)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_plan_of_k_slots_a_token_gives_eager_values() -> None:
    torch._dynamo.reset()
    expert = torch.tensor([[0, 1], [2, -1], [4, 3]])

    def planned(expert: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return plan(None, expert, num_tokens=3, num_experts=4, slots_per_token=2)[:4]

    got = torch.compile(planned, fullgraph=True, backend="aot_eager")(expert)
    assert all(torch.equal(a, b) for a, b in zip(got, planned(expert), strict=True))


@pytest.mark.parametrize("slots_per_token", [3, None])
def test_operators_pass_the_checks_of_torch_library(slots_per_token: int | None) -> None:
    token = torch.arange(4, dtype=torch.int32).repeat_interleave(3)
    expert = torch.tensor([0, 1, 2, -1, 4, 3, 9, 1, 0, 0, 0, 2])
    p = plan(token, expert, num_tokens=4, num_experts=5, slots_per_token=slots_per_token)
    rows, score = torch.randn(12, 8, requires_grad=True), torch.rand(12, requires_grad=True)
    operators = torch.ops.sonicmoe_dispatch
    torch.library.opcheck(operators.count_cumsum.default, (expert, 5))
    torch.library.opcheck(operators.plan.default, (expert, token, 4, 5, slots_per_token))
    if slots_per_token is not None:
        torch.library.opcheck(operators.plan.default, (expert, None, 4, 5, slots_per_token))
    row_to_token = p.row_to_token if slots_per_token is None else None
    indices = (p.slot_to_row, p.row_to_slot, row_to_token, p.token_offsets, p.token_slots, 4, slots_per_token)
    torch.library.opcheck(operators.gather_sum.default, (rows, score, *indices))
    torch.library.opcheck(operators.gather_sum.default, (rows, None, *indices))


def test_first_calls_do_not_import_torch_compile() -> None:
    program = """
import sys, torch
from dispatch import gather_sum, plan
p = plan(torch.tensor([0, 1]), torch.tensor([0, 0]), num_tokens=2, num_experts=1)
gather_sum(torch.ones(2, 2, requires_grad=True), None, p).sum().backward()
sys.exit("torch._dynamo" in sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0
