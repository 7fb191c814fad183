"""Speed defects on simulated timings: the gate's real rule, judged without a GPU.

The times are those of the best published kernels for (T, H, I, E, K) = (4096, 4096, 1024, 128, 8), forward+backward, on one H100
(ms; the bound is 4.6), and every trial scatters around them as repeated trials do.
"""

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from testing.matrix import gate, ratchet
from testing.matrix.cells import Matrix, SpeedCell
from testing.matrix.describe import describe
from testing.matrix.results import NO_FLOOR, PASSED, SCHEMA
from testing.matrix.speed import TRIALS, Machine, Trial, judge_speed, summarize

OPERATIONS = {
    "up_projection": 1.41,
    "down_projection": 0.64,
    "activation_backward": 1.13,
    "down_weight_grad": 0.66,
    "dx_rows": 1.25,
    "up_weight_grad": 1.28,
    "gather_sum": 0.20,
}
REST, BOUND = 0.15, 4.6
SCATTER = 0.003
"""Standard deviation of one trial, relative; of the layer, of each operation and of the bound alike."""
MACHINE = Machine("an H100 (simulated)", 700.0)
DEFECTS: dict[str, dict[str, float]] = {
    "a kernel 5% slower": {"up_weight_grad": 1.05},
    "every kernel 4% slower": dict.fromkeys(OPERATIONS, 1.04),
    "a gap of 0.3 ms between kernels": {"rest": (REST + 0.3) / REST},
}
"""Name -> by what factor an operation, or the rest of the layer, takes longer."""


def simulate(generator: random.Random, slower: dict[str, float], *, scatter: float = SCATTER, trials: int = TRIALS) -> dict[str, Any]:
    """A speed cell's measured fields."""

    def around(ms: float) -> float:
        return ms * generator.gauss(1.0, scatter)

    runs = []
    for _ in range(trials):
        kernels = {name: around(ms * slower.get(name, 1.0)) for name, ms in OPERATIONS.items()}
        expected = sum(ms * slower.get(name, 1.0) for name, ms in OPERATIONS.items()) + REST * slower.get("rest", 1.0)
        runs.append(Trial(around(expected), around(BOUND), kernels))
    summary = summarize(runs)
    return {**summary, "tflops": 18 * 32768 * 4096 * 1024 / (summary["ms"] * 1e9)}


def decide(matrix: Matrix, measured: dict[str, Any]) -> gate.Verdict:
    """The gate's verdict on one speed cell, whose floors are those of the matrix."""
    (cell,) = matrix.cells
    profile = matrix.profiles["hopper"]
    result = {
        **MACHINE._asdict(),
        "schema": SCHEMA,
        "profile": profile.name,
        "sources": "simulated",
        "seed": 0,
        "shard": "1/1",
        "cells": [{**describe(cell, profile), "status": PASSED, **measured}],
    }
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        path = Path(folder) / "shard-1-of-1.json"
        path.write_text(json.dumps(result), encoding="utf-8")
        return gate.decide(matrix, [path], profile.name)


def with_recorded_floor(matrix: Matrix, generator: random.Random) -> Matrix:
    """The matrix cut to its first forward+backward speed cell, with the floor that three simulated runs of good code propose."""
    cell = next(cell for cell in matrix.cells if isinstance(cell, SpeedCell) and cell.mode == "forward+backward")
    part = replace(matrix, cells=(cell,), floors=[])
    runs = [{"name": cell.name, "status": NO_FLOOR, **simulate(generator, {})} for _ in range(3)]
    results = [{**MACHINE._asdict(), "date": "earlier runs", "cells": [run]} for run in runs]
    return replace(part, floors=ratchet.floors_of(ratchet.propose(part, results)))


def losses(matrix: Matrix, measured: dict[str, Any]) -> list[tuple[str, float]]:
    """(what got slower, by which share), as the gate sees it."""
    found = judge_speed({"name": matrix.cells[0].name, **measured}, matrix.floors, matrix.speed_rule, MACHINE)
    return [(loss.what, loss.share) for loss in found]
