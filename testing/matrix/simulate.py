"""Speed defects on simulated timings: the gate's real rule, judged without a GPU.

The times are those of the best published kernels for (T, H, I, E, K) = (4096, 4096, 1024, 128, 8), forward+backward, on one H100
(ms; the bound is 4.6). Draws of tokens and router differ by a factor that stays, and every trial scatters around that.

`python -m testing.matrix.simulate` prints the table of docs/gate.md on how often the rule errs.
"""

import json
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from testing.matrix import gate, ratchet
from testing.matrix.cells import Matrix, SpeedCell, load_matrix
from testing.matrix.describe import describe
from testing.matrix.results import NO_FLOOR, PASSED, SCHEMA
from testing.matrix.speed import DRAWS, Floor, Floors, Machine, Round, Rule, Trial, judge_speed, needs_more_rounds, summarize

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
DRAW_SCATTER = 0.03
"""Standard deviation of a draw's time, relative, as where an expert's weights' gradients take two or three stages."""
MACHINE = Machine("an H100 (simulated)", 700.0)
DEFECTS: dict[str, dict[str, float]] = {
    "a kernel 5% slower": {"up_weight_grad": 1.05},
    "every kernel 4% slower": dict.fromkeys(OPERATIONS, 1.04),
    "a gap of 0.3 ms between kernels": {"rest": (REST + 0.3) / REST},
}
"""Name -> by what factor an operation, or the rest of the layer, takes longer."""


def draw_works(generator: random.Random, scatter: float = DRAW_SCATTER) -> list[float]:
    """By what factor each draw takes longer than another."""
    return [generator.gauss(1.0, scatter) for _ in range(DRAWS)]


WORKS = draw_works(random.Random("the draws of the simulated cell"))
"""The same in all runs, as a cell's draws are."""


def timed(rule: Rule, works: Sequence[float], trial: Callable[[float], Trial]) -> list[Round]:
    """Rounds of trials, as many as the rule asks for."""
    rounds: list[Round] = []
    while needs_more_rounds(rounds, rule):
        rounds.append([trial(work) for work in works])
    return rounds


def simulate(generator: random.Random, rule: Rule, slower: dict[str, float]) -> dict[str, Any]:
    """A speed cell's measured fields."""

    def around(ms: float) -> float:
        return ms * generator.gauss(1.0, SCATTER)

    def trial(work: float) -> Trial:
        expected = {name: work * ms * slower.get(name, 1.0) for name, ms in OPERATIONS.items()}
        whole = sum(expected.values()) + REST * slower.get("rest", 1.0)
        return Trial(around(whole), around(BOUND), {name: around(ms) for name, ms in expected.items()})

    summary = summarize(timed(rule, WORKS, trial))
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
    runs = [{"name": cell.name, "status": NO_FLOOR, **simulate(generator, matrix.speed_rule, {})} for _ in range(3)]
    results = [{**MACHINE._asdict(), "date": "earlier runs", "cells": [run]} for run in runs]
    return replace(part, floors=ratchet.floors_of(ratchet.propose(part, results)))


def losses(matrix: Matrix, measured: dict[str, Any]) -> list[tuple[str, float]]:
    """(what got slower, by which share), as the gate sees it."""
    found = judge_speed({"name": matrix.cells[0].name, **measured}, matrix.floors, matrix.speed_rule, MACHINE)
    return [(loss.what, loss.share) for loss in found]


def failures(
    generator: random.Random, rule: Rule, *, loss: float, scatter: float, draw_scatter: float = DRAW_SCATTER, repeats: int = 500
) -> Counter[str]:
    """How many of so many layers that lost this share of their ratio fail as slower ("ratio") and as too noisy ("noise").

    Each has draws of its own and a floor that is exactly right for them; layer and bound each scatter from trial to trial.
    """
    found: Counter[str] = Counter()
    for _ in range(repeats):
        works = draw_works(generator, draw_scatter)
        floor = Floor(statistics.fmean(1 / work for work in works), 1.0, {}, "now")

        def trial(work: float) -> Trial:
            return Trial(work / (1 - loss) * generator.gauss(1.0, scatter), generator.gauss(1.0, scatter), {})

        measured = {"name": "layer", **summarize(timed(rule, works, trial))}
        another = MACHINE._replace(power_limit_w=None)  # whose absolute times are not judged
        found.update(fail.what for fail in judge_speed(measured, [Floors(*MACHINE, {"layer": floor})], rule, another))
    return found


def print_table(*, draw_scatter: float = DRAW_SCATTER, repeats: int = 500) -> None:
    """The table of docs/gate.md: failures as slower / as too noisy, in percent."""
    rule = load_matrix().speed_rule
    lost = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
    print(f"| scatter | no loss | {' | '.join(f'{100 * loss:.0f} %' for loss in lost[1:])} |\n|{'--:|' * (1 + len(lost))}")
    for scatter in (0.001, 0.003, 0.006, 0.01, 0.02):
        options = {"scatter": scatter, "draw_scatter": draw_scatter, "repeats": repeats}
        counts = [failures(random.Random(f"{scatter} {loss}"), rule, loss=loss, **options) for loss in lost]
        shares = [f"{100 * found['ratio'] / repeats:.0f} / {100 * found['noise'] / repeats:.0f}" for found in counts]
        print(f"| {100 * scatter:.1f} % | {' | '.join(shares)} |")


if __name__ == "__main__":
    print_table()
