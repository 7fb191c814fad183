"""Tests the gate: plants each defect alone, runs its cell in a worker as any run does, and asks the gate for its verdict.

The gate must fail for every defect and pass for the untouched code. A defect that survives is a defect of the gate: widen the
grid or tighten the judgement until it is caught. One that makes its cell crash proves nothing and counts as surviving.
"""

import functools
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from testing.matrix import gate, judge, planting_source, pool, runner, simulate
from testing.matrix.cells import LayerCell, Matrix, Profile
from testing.matrix.results import FAILED

UNTOUCHED = "untouched code"
Setup = Callable[[str | None], Callable[[], pool.Work]]
"""What workers run with a defect of that name planted; with none planted for None."""


class Outcome(NamedTuple):
    """What became of one defect."""

    defect: str
    cell: str
    caught: bool
    by: str
    """The tensor or the checks that showed it."""
    margin: float | None
    """The largest error over its limit; infinite where it is not finite, None where only checks, which are exact, showed it."""
    why: str
    """The gate's words, or why the defect counts as surviving."""
    seconds: float


@dataclass(frozen=True)
class SelftestOptions:
    """What the command line asked for."""

    jobs: int
    cores: int
    seed: int
    gpus: int
    command: str


class Selftest(NamedTuple):
    """The outcome of all: `reasons` says why it fails, and is empty where every defect was caught and nothing else fails."""

    outcomes: list[Outcome]
    untouched: list[dict[str, Any]]
    """Per cell: name, passed, why, share (its largest error over the limit, None where a cell has only checks)."""
    reasons: list[str]

    def as_json(self) -> dict[str, Any]:
        margins = [{**outcome._asdict(), "margin": _finite(outcome.margin)} for outcome in self.outcomes]
        return {"passed": not self.reasons, "reasons": self.reasons, "defects": margins, "untouched": self.untouched}


def run_selftest(
    matrix: Matrix,
    profile: Profile,
    defects: Mapping[str, str],
    setup: Setup,
    options: SelftestOptions,
    environment: dict[str, Any],
    *,
    ended: Callable[[str, bool, str], None] = lambda name, good, line: None,
) -> Selftest:
    """Plant every defect alone, `options.jobs` at a time, in turn on each of the GPUs.

    Args:
        defects: name -> the cell that must fail.
        ended: told of each run as it ends: the defect (or `UNTOUCHED`), whether it went as it must, and a line about it.
    """
    by_name = {cell.name: cell for cell in matrix.cells}
    outcomes: dict[str, Outcome] = {}
    untouched: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder, ThreadPoolExecutor(options.jobs) as threads:

        def start(number: int, name: str | None, cells: list[str]) -> tuple[gate.Verdict, float]:
            begin = time.monotonic()
            part = replace(matrix, cells=tuple(by_name[cell] for cell in cells))
            out = Path(folder) / str(number)
            verdict = _run_and_decide(part, profile, setup(name), out, options, environment, first_gpu=number)
            return verdict, time.monotonic() - begin

        runs = {threads.submit(start, 0, None, sorted(set(defects.values()))): None}
        runs |= {threads.submit(start, number, name, [cell]): name for number, (name, cell) in enumerate(defects.items(), 1)}
        for future in as_completed(runs):
            name, (verdict, seconds) = runs[future], future.result()
            if name is None:
                untouched = list(_untouched(matrix, verdict))
                ended(UNTOUCHED, verdict.passed, "; ".join(verdict.reasons) or f"{len(untouched)} cells pass")
            else:
                outcomes[name] = outcome_of(name, by_name[defects[name]], verdict, matrix, seconds)
                ended(name, outcomes[name].caught, outcomes[name].why)
    ordered = [outcomes[name] for name in defects]
    return Selftest(ordered, untouched, _reasons(ordered, untouched))


def run_speed_selftest(matrix: Matrix, seed: int) -> Selftest:
    """The speed defects, on simulated timings, through the gate's rule: each must fail, and good code must pass."""
    generator = random.Random(seed)
    part = simulate.with_recorded_floor(matrix, generator)
    (cell,) = part.cells
    good = simulate.decide(part, simulate.simulate(generator, part.speed_rule, {}))
    outcomes = []
    for name, slower in simulate.DEFECTS.items():
        measured = simulate.simulate(generator, part.speed_rule, slower)
        verdict = simulate.decide(part, measured)
        lost = simulate.losses(part, measured)
        by = ", ".join(f"{what} {share:.1%}" for what, share in lost[:3])
        margin = max((share for _, share in lost), default=0.0) / part.speed_rule.allowed_loss
        why = "; ".join(verdict.reasons) or "the gate passes"
        outcomes.append(Outcome(name, f"{cell.name}, simulated", not verdict.passed, by, margin, why, 0.0))
    untouched = [{"name": f"{cell.name}, simulated", "passed": good.passed, "why": "; ".join(good.reasons), "share": None}]
    return Selftest(outcomes, untouched, _reasons(outcomes, untouched))


def joined(first: Selftest, second: Selftest) -> Selftest:
    return Selftest(*(one + other for one, other in zip(first, second, strict=True)))


def _reasons(outcomes: list[Outcome], untouched: list[dict[str, Any]]) -> list[str]:
    reasons = [f"{UNTOUCHED}: {cell['name']}: {cell['why']}" for cell in untouched if not cell["passed"]]
    return reasons + [f"{outcome.defect}: survives in {outcome.cell}: {outcome.why}" for outcome in outcomes if not outcome.caught]


def _run_and_decide(
    part: Matrix,
    profile: Profile,
    setup: Callable[[], pool.Work],
    out: Path,
    options: SelftestOptions,
    environment: dict[str, Any],
    *,
    first_gpu: int,
) -> gate.Verdict:
    run_options = runner.RunOptions(
        shard_index=1,
        shard_count=1,
        out=out,
        jobs=1,
        seed=options.seed,
        pattern=None,
        resume=False,
        gpus=options.gpus,
        command=options.command,
        cores=max(1, options.cores // options.jobs),
        first_gpu=first_gpu,
        quiet=True,
    )
    runner.run_shard(part, profile, run_options, setup, environment)
    return gate.decide(part, [runner.shard_path(out, 1, 1)], profile.name)


def outcome_of(defect: str, cell: Any, verdict: gate.Verdict, matrix: Matrix, seconds: float) -> Outcome:
    """What the gate's verdict on the cell says of the defect."""
    (result,) = verdict.merged["cells"]
    checks = [item["name"] for item in result.get("checks", []) if item["passed"] is not True]
    by = f"{len(checks)} checks: {', '.join(checks[:2])}" if len(checks) > 2 else ", ".join(checks)
    margin = None
    if isinstance(cell, LayerCell) and result.get("errors"):
        worst = judge.worst_error(cell, result, matrix)
        if worst.share > 1:
            margin, by = worst.share, "; ".join(filter(None, [f"{worst.tensor} {worst.scope.replace('_', ' ')}", by]))
    why = "; ".join(verdict.reasons) or "the gate passes"
    caught = not verdict.passed and result["status"] == FAILED and "crash" not in result
    return Outcome(defect, cell.name, caught, by, margin, why, round(seconds, 1))


def _untouched(matrix: Matrix, verdict: gate.Verdict) -> Iterator[dict[str, Any]]:
    by_name = {cell.name: cell for cell in matrix.cells}
    for result in verdict.merged["cells"]:
        cell = by_name[result["name"]]
        share = judge.worst_share(cell, result, matrix) if isinstance(cell, LayerCell) else None
        yield {"name": cell.name, "passed": result["passed"], "why": result["why"], "share": _finite(share)}


def _finite(value: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "not finite" if value == float("inf") else value


def margin_text(margin: float | None) -> str:
    if margin is None:
        return "exact"
    return "not finite" if margin == float("inf") else f"{margin:.3g} x"


def print_table(console: Console, selftest: Selftest) -> None:
    table = Table(title="Planted defects", title_justify="left")
    for column, justify in (("defect", "left"), ("cell", "left"), ("caught by", "left"), ("error / limit", "right"), ("", "left")):
        table.add_column(column, justify=justify, overflow="fold")
    for outcome in selftest.outcomes:
        status = "[green]caught[/green]" if outcome.caught else "[bold red]SURVIVES[/bold red]"
        table.add_row(outcome.defect, outcome.cell, outcome.by, margin_text(outcome.margin) if outcome.caught else "", status)
    console.print(table)
    for reason in selftest.reasons:
        console.print(reason, style="red", markup=False, highlight=False)
    console.print(headline(selftest), style="bold red" if selftest.reasons else "bold green", highlight=False)


def headline(selftest: Selftest) -> str:
    caught = sum(outcome.caught for outcome in selftest.outcomes)
    passed = sum(cell["passed"] is True for cell in selftest.untouched)
    verdict = "FAIL" if selftest.reasons else "PASS"
    return f"{verdict}: {caught} of {len(selftest.outcomes)} defects caught; untouched, {passed} of {len(selftest.untouched)} cells pass"


def markdown(selftest: Selftest) -> str:
    """The table for a job's summary."""
    lines = [f"## Gate selftest: {headline(selftest)}", "", "| defect | cell | caught by | error / limit |", "|---|---|---|--:|"]
    for outcome in selftest.outcomes:
        margin = margin_text(outcome.margin) if outcome.caught else "**survives**"
        lines.append(f"| {outcome.defect} | {outcome.cell} | {outcome.by} | {margin} |")
    if selftest.reasons:
        lines += ["", *(f"- {reason}" for reason in selftest.reasons)]
    return "\n".join(lines) + "\n"


def default_setup(matrix: Matrix, profile: Profile, device: str) -> Setup:
    """The setup of real workers; partials of an importable function, so that they can be sent to a new process."""
    from testing.matrix.defects_kernels import KERNEL_DEFECTS

    def setup(defect: str | None) -> Callable[[], pool.Work]:
        where = (str(matrix.path), profile.name, device)
        if defect in KERNEL_DEFECTS:
            return functools.partial(planting_source.work_with, defect, KERNEL_DEFECTS[defect], *where)
        return functools.partial(_planted_work, *where, defect)

    return setup


def _planted_work(matrix_path: str, profile_name: str, device: str, defect: str | None) -> pool.Work:
    from testing.matrix.defects import DEFECTS
    from testing.matrix.execute import prepare
    from testing.matrix.planting import planted

    work = prepare(Path(matrix_path), profile_name, device)
    if defect is None:
        return work

    def wrong(name: str, seed: int) -> dict[str, Any]:
        with planted(DEFECTS[defect], device):
            return work(name, seed)

    return wrong
