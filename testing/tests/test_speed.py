"""The speed gate on fabricated timings: what fails, what is granted to noise, what is only listed, and what ratchet proposes."""

import json
import random
from dataclasses import replace

import pytest

from testing.matrix import gate, selftest, simulate
from testing.matrix.__main__ import main
from testing.matrix.cells import MatrixError, load_matrix
from testing.matrix.describe import describe
from testing.matrix.results import NO_FLOOR
from testing.matrix.speed import (
    MOST_ROUNDS,
    ROUNDS,
    Floor,
    Floors,
    Machine,
    Rule,
    Trial,
    floor_of,
    judge_speed,
    needs_more_rounds,
    summarize,
)
from testing.tests import small_matrix

NAME = "speed/fast/forward"
H100, H200 = Machine("NVIDIA H100", 700.0), Machine("NVIDIA H200", 700.0)
FLOOR = Floor(ratio=0.8, tflops=400.0, kernels={"up_projection": 1.5, "down_projection": 3.0}, date="2026-01-02")
RULE = Rule(allowed_loss=0.02, most_noise=0.01)


def measured(ratio=0.8, spread=0.0, tflops=400.0, trials=9, up=1.5, down=3.0):
    kernels = {"up_projection": up, "down_projection": down}
    return {
        "name": NAME,
        "trials": trials,
        "ms": 1.0,
        "ms_spread": 0.0,
        "bound_ms": ratio,
        "bound_ms_spread": 0.0,
        "ratio": ratio,
        "ratio_spread": spread,
        "tflops": tflops,
        "kernels": {name: {"ms": ratio / value, "ratio": value, "ratio_spread": 0.0} for name, value in kernels.items()},
    }


def judged(machine=H100, floors=None, **values):
    floors = [Floors(*H100, {NAME: FLOOR})] if floors is None else floors
    return [loss.what for loss in judge_speed(measured(**values), floors, RULE, machine)]


def test_the_floor_and_two_percent_below_pass_and_more_fails():
    assert judged() == []
    assert judged(ratio=0.7841) == []
    assert judged(ratio=0.7839) == ["ratio"]


def test_noise_is_granted_up_to_its_limit():
    below = 0.78  # 2.5 % below the floor
    assert judged(ratio=below) == ["ratio"]
    assert judged(ratio=below, spread=0.005) == []  # uncertain by 0.0047
    assert judged(ratio=below, spread=0.005, trials=27) == ["ratio"]
    assert judged(ratio=below, spread=0.009) == ["noise"]  # uncertain by 0.0084, 1.1 % of the ratio


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.004, 0.008])
def test_a_measured_loss_of_three_percent_never_passes(spread):
    assert judged(ratio=0.8 * 0.97, spread=spread)


def test_one_slow_operation_fails_and_is_named_with_its_loss():
    (loss,) = judge_speed(measured(up=1.5 / 1.05), [Floors(*H100, {NAME: FLOOR})], RULE, H100)
    assert loss.what == "up_projection"
    assert loss.why == "up_projection takes 5.0% longer, 0.560 ms, than the record of 2026-01-02 on NVIDIA H100"


def test_the_largest_loss_of_the_operations_comes_first():
    assert judged(up=1.4, down=2.5) == ["down_projection", "up_projection"]


def test_absolute_tflops_count_on_the_named_device_and_power_limit_only():
    assert judged(tflops=390.0) == ["tflops"]
    other_limit = Machine("NVIDIA H100", 350.0)
    assert judged(other_limit, tflops=390.0, up=1.0) == []
    assert judged(other_limit, ratio=0.7) == ["ratio"]


def test_a_ratio_is_held_to_its_devices_floors_of_the_own_power_limit_first():
    floors = [Floors(*H100, {NAME: FLOOR}), Floors("NVIDIA H100", 350.0, {NAME: FLOOR._replace(ratio=0.6, kernels={})})]
    assert judged(Machine("NVIDIA H100", 350.0), floors, ratio=0.7) == []
    assert judged(H100, floors, ratio=0.7) == ["ratio"]
    assert floor_of(floors, NAME, Machine("NVIDIA H100", 500.0)) == (floors[0], FLOOR)
    assert floor_of(floors, NAME, H200) is None
    assert judged(H200, floors, ratio=0.1) == []


def rounds_of(*rounds):
    """Rounds of trials that took so many ms, one number for each draw; the bound takes 1 ms and the one operation half of the layer's."""
    return [[Trial(ms, 1.0, {"up_projection": ms / 2}) for ms in row] for row in rounds]


def test_a_cell_is_the_mean_over_draws_of_the_medians_over_rounds():
    summary = summarize(rounds_of((1.0, 4.0), (2.0, 4.0), (2.0, 5.0)))
    assert (summary["ms"], summary["bound_ms"], summary["trials"]) == (3.0, 1.0, 6)
    assert (summary["ratio"], summary["draw_ratios"]) == (0.375, [0.5, 0.25])
    assert (summary["kernels"]["up_projection"]["ms"], summary["kernels"]["up_projection"]["ratio"]) == (1.5, 0.75)
    # Each draw's squares about its own mean are 2/3, in all 4/3 for 6 trials - 2 draws: sigma is the root of 1/3.
    assert summary["ms_spread"] == pytest.approx(1.349 * (1 / 3) ** 0.5)


def test_what_tells_draws_apart_is_no_noise():
    summary = summarize(rounds_of((1.0, 1.03, 1.2), (1.0, 1.03, 1.2)))
    spreads = [summary[key] for key in ("ms_spread", "bound_ms_spread", "ratio_spread")]
    assert [*spreads, summary["kernels"]["up_projection"]["ratio_spread"]] == [0.0] * 4


def test_more_rounds_are_run_while_the_ratio_is_uncertain_and_never_without_end():
    steady, noisy = rounds_of((1.0, 1.2), (1.0, 1.2)), rounds_of((1.0, 1.2), (1.1, 1.3))
    assert needs_more_rounds([], RULE)
    assert needs_more_rounds(steady[: ROUNDS - 1], RULE)
    assert not needs_more_rounds(steady, RULE)
    assert needs_more_rounds(noisy, RULE)
    assert not needs_more_rounds(noisy * (MOST_ROUNDS // 2), RULE)


@pytest.mark.parametrize("scatter", [0.003, 0.006])
def test_draws_three_percent_apart_neither_fail_good_code_nor_hide_a_loss_of_five_percent(scatter):
    good, slow = (simulate.failures(random.Random(3), RULE, loss=loss, scatter=scatter, repeats=100) for loss in (0.0, 0.05))
    assert (dict(good), dict(slow)) == ({}, {"ratio": 100})


def test_simulated_speed_defects_are_caught_and_good_code_passes():
    for seed in range(10):
        tested = selftest.run_speed_selftest(load_matrix(), seed)
        assert tested.reasons == []
    assert [(outcome.defect, outcome.by.split()[0]) for outcome in tested.outcomes] == [
        ("a kernel 5% slower", "up_weight_grad"),
        ("every kernel 4% slower", "ratio"),
        ("a gap of 0.3 ms between kernels", "ratio"),
    ]


def result_of(matrix, machine, **values):
    profile = matrix.profiles["hopper"]
    cell = next(cell for cell in matrix.cells if cell.name == NAME)
    header = {"schema": 1, "profile": "hopper", "sources": "abc", "seed": 1, "shard": "1/1", "date": "2026-03-04T05:06:07+00:00"}
    return {**header, **machine._asdict(), "cells": [{**measured(**values), **describe(cell, profile), "status": NO_FLOOR}]}


@pytest.fixture
def record(tmp_path, tmp_path_factory):
    """Writes a result; its matrix lies elsewhere than the test's own."""
    matrix = small_matrix.load(tmp_path_factory.mktemp("recorded"))

    def write(machine=H100, **values):
        path = tmp_path / f"shard-{random.random()}-of-1.json"
        path.write_text(json.dumps(result_of(matrix, machine, **values)))
        return path

    return write


def test_a_cell_without_a_floor_neither_passes_nor_fails(tmp_path, record):
    matrix = small_matrix.load(tmp_path)
    part = replace(matrix, cells=tuple(cell for cell in matrix.cells if cell.name == NAME))
    verdict = gate.decide(part, [record()])
    assert verdict.passed
    assert [(cell["status"], cell["passed"]) for cell in verdict.merged["cells"]] == [(NO_FLOOR, None)]


def test_a_regression_in_a_result_fails_the_gate_by_cell_and_operation(tmp_path, record):
    matrix = small_matrix.load(tmp_path)
    part = replace(matrix, cells=tuple(cell for cell in matrix.cells if cell.name == NAME), floors=[Floors(*H100, {NAME: FLOOR})])
    assert gate.decide(part, [record()]).passed
    (reason,) = gate.decide(part, [record(ratio=0.76, up=1.4)]).reasons
    assert reason == (
        f"{NAME}: failed: ratio 0.760 is 5.0% below the 0.800 of 2026-01-02 on NVIDIA H100; "
        "up_projection takes 7.1% longer, 0.543 ms, than the record of 2026-01-02 on NVIDIA H100"
    )


def test_ratchet_writes_floors_that_the_recorded_runs_pass_and_keeps_every_comment(tmp_path, record, capsys):
    path = small_matrix.write(tmp_path, ("floors:\n", "floors:  # by hand: none\n"))
    files = [str(record(ratio=ratio)) for ratio in (0.70, 0.75, 0.76)]
    assert main(["ratchet", *files, "--matrix", str(path), "--write"]) == 0
    assert "# by hand: none" in path.read_text()
    (block,) = load_matrix(path).floors
    assert (block.device, block.power_limit_w) == H100
    floor = block.cells[NAME]
    assert floor == Floor(0.7142, 400.0, {"up_projection": 1.5, "down_projection": 3.0}, "2026-03-04")  # 0.70 / 0.98, below the median
    assert all(judge_speed(measured(ratio=ratio), [block], RULE, H100) == [] for ratio in (0.70, 0.75, 0.76))


def test_ratchet_raises_lowers_only_when_asked_and_adds_devices(tmp_path, record, capsys):
    path = small_matrix.write(tmp_path)
    main(["ratchet", str(record(ratio=0.7)), "--matrix", str(path), "--write"])
    main(["ratchet", str(record(ratio=0.6)), "--matrix", str(path), "--write"])
    assert load_matrix(path).floors[0].cells[NAME].ratio == 0.7
    main(["ratchet", str(record(ratio=0.8)), str(record(H200, ratio=0.5)), "--matrix", str(path), "--write"])
    assert [(block.device, block.cells[NAME].ratio) for block in load_matrix(path).floors] == [("NVIDIA H100", 0.8), ("NVIDIA H200", 0.5)]
    main(["ratchet", str(record(ratio=0.6)), "--matrix", str(path), "--write", "--lower"])
    assert [block.cells[NAME].ratio for block in load_matrix(path).floors] == [0.6, 0.5]


def test_ratchet_prints_a_patch_and_leaves_the_file(tmp_path, record, capsys):
    path = small_matrix.write(tmp_path)
    before = path.read_text()
    assert main(["ratchet", str(record()), "--matrix", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("--- a/")
    kernels = "{up_projection: 1.5, down_projection: 3}"
    assert f"+      {NAME}: {{ratio: 0.8, tflops: 400, date: 2026-03-04, kernels: {kernels}}}\n" in out
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("  - {device: X, power_limit_w: 1}", "floors of X: cells is missing"),
        ("  - {device: X, power_limit_w: 1, cells: {layer/one: {}}}", "layer/one is not a speed cell of this file"),
        (f"  - {{device: X, power_limit_w: 1, cells: {{{NAME}: {{ratio: 0, tflops: 1, date: 2026-01-01}}}}}}", "ratio 0 must be a number"),
        ("  all", "floors: must be a list of devices"),
    ],
)
def test_floors_that_cannot_be_are_refused(tmp_path, block, problem):
    path = small_matrix.write(tmp_path, ("floors:\n", f"floors:\n{block}\n"))
    with pytest.raises(MatrixError, match=problem):
        load_matrix(path)


def test_floors_before_another_section_are_refused_by_ratchet(tmp_path, record, capsys):
    path = small_matrix.write(tmp_path, ("floors:\n", ""), ("speed_rule:", "floors:\nspeed_rule:"))
    assert main(["ratchet", str(record()), "--matrix", str(path)]) == 2
    assert "floors: must be the last section" in capsys.readouterr().err
