"""Measuring a speed cell, here on a CPU: every operation is timed within its layer, and the functions are back afterwards."""

import pytest
import torch

import dispatch
from sonicmoe.backends import reference
from sonicmoe.thiek import Thiek
from sonicmoe.timing import Timing
from testing.matrix import checks_speed
from testing.matrix.cells import RoutingSpec, SpeedCell
from testing.matrix.checks_speed import measure_speed
from testing.matrix.operation_times import operation_times
from testing.matrix.speed import DRAWS, ROUNDS, Rule

LENIENT = Rule(allowed_loss=0.02, most_noise=1e9)


def cell(mode, name="speed/small"):
    return SpeedCell(name, 1, Thiek(32, 64, 16, 4, 2), RoutingSpec("softmax"), mode, "bf16")


def test_a_training_step_has_a_time_for_each_of_its_operations():
    result = measure_speed(cell("forward+backward"), 1, LENIENT, device="cpu")
    assert result["trials"] == DRAWS * ROUNDS
    assert len(result["draw_ratios"]) == DRAWS
    assert set(result["kernels"]) == {
        "up_projection", "down_projection", "gather_sum", "activation_backward", "down_weight_grad", "up_weight_grad", "dx_rows",
    }  # fmt: skip
    assert result["bound_ms"] > 0
    assert all(kernel["ms"] > 0 for kernel in result["kernels"].values())
    assert sum(kernel["ms"] for kernel in result["kernels"].values()) < 3 * result["ms"]
    assert result["tflops"] * result["ms"] * 1e9 == pytest.approx(18 * 64 * 64 * 16)


def test_inference_runs_the_forward_operations_without_gradients():
    assert set(measure_speed(cell("inference"), 1, LENIENT, device="cpu")["kernels"]) == {"up_projection", "down_projection", "gather_sum"}


@pytest.fixture
def timed_routings(monkeypatch):
    """For a cell and a seed the logits of each trial, in order; nothing is timed."""

    def routings(cell, seed):
        seen, timed = [], []
        logits_of = checks_speed.router.router_logits

        def measure(variants, **_):
            for variant in variants.values():
                variant.run(None)
            timed.append(seen[-1])
            return dict.fromkeys(variants, Timing(1.0, 0.0, 1))

        def router_logits(x, weight):
            seen.append(logits_of(x, weight))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(checks_speed.router, "router_logits", router_logits)
            patch.setattr(checks_speed.timing, "measure", measure)
            measure_speed(cell, seed, LENIENT, device="cpu")
        return timed

    return routings


def test_draws_are_the_same_in_every_round_and_run_and_others_in_another_cell(timed_routings):
    first = timed_routings(cell("inference"), 1)
    again, other = timed_routings(cell("inference"), 2), timed_routings(cell("inference", "speed/other"), 1)
    assert len(first) == DRAWS * ROUNDS
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert all(torch.equal(one, same) for one, same in zip(first[:DRAWS], first[DRAWS:], strict=True))
    distinct = [*first[:DRAWS], *other[:DRAWS]]
    assert not any(torch.equal(one, two) for index, one in enumerate(distinct) for two in distinct[:index])


def test_calls_of_one_operation_add_up_and_the_right_functions_are_back(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("testing.matrix.operation_times.time.perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(reference, "dx_rows", lambda: torch.zeros(()))
    right, gather = reference.dx_rows, dispatch.gather_sum
    with operation_times("cpu") as times:
        reference.dx_rows()
        reference.dx_rows()
    assert times.milliseconds() == {"dx_rows": 2000.0}
    assert (reference.dx_rows, dispatch.gather_sum) == (right, gather)
