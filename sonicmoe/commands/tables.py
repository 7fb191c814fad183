"""What the commands that measure a layer print."""

import json
import math
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sonicmoe import environment
from sonicmoe.accuracy import Threshold
from sonicmoe.benchmark import Judged, Problem, Rows


def progress() -> Progress:
    """A bar on stderr that goes away when it is done, so that stdout holds results only; nothing where stderr is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def accuracy_table(judged: Judged, threshold: Threshold) -> Table:
    table = Table(title="Accuracy against the float64 oracle", title_justify="left")
    columns = ("tensor", "reference max", "reference mean", "max abs error", "relative error", "worst block", "")
    for column in columns:
        table.add_column(column, justify="left" if column in ("tensor", "") else "right")
    for name, error in judged.errors.items():
        largest, mean = judged.reference[name]
        numbers = (largest, mean, error.max_abs, error.whole, error.worst_block)
        passed = error.whole <= threshold.whole and error.worst_block <= threshold.worst_block
        table.add_row(name, *(f"{number:.2e}" for number in numbers), "pass" if passed else "[red]FAIL[/red]")
    table.caption = (
        f"relative Frobenius errors; allowed {threshold.whole:.1e} for a tensor, {threshold.worst_block:.1e} for its worst block "
        "(128 rows of o and dx, one expert of the rest); reference values are absolute"
    )
    return table


def speed_table(cells: list[dict[str, Any]]) -> Table:
    table = Table(title="Speed", title_justify="left")
    for column in ("mode", "ms", "spread", "TFLOPS", "GEMM bound ms", "ratio"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for cell in cells:
        table.add_row(
            cell["mode"],
            f"{cell['ms']:.3f}",
            f"{cell['ms_spread']:.3f}",
            f"{cell['tflops']:.3g}",
            f"{cell['bound_ms']:.3f}",
            f"{cell['ratio']:.2f}",
        )
    table.caption = "medians and distance between quartiles; the bound is the products alone as torch.bmm, timed in the same run"
    return table


def input_table(cells: list[dict[str, Any]]) -> Table:
    first = cells[0]
    table = Table(title=f"Input of {first['input_gib']:g} GiB in batches of {first['batch_mib']:g} MiB", title_justify="left")
    for column in ("input", "step ms", "spread", "wait ms", "share of step", "slower than resident"):
        table.add_column(column, justify="left" if column == "input" else "right")
    for cell in cells:
        numbers = (f"{cell['ms']:.3f}", f"{cell['ms_spread']:.3f}", f"{cell['input_wait_ms']:.3f}")
        table.add_row(cell["input"], *numbers, f"{cell['input_wait_share']:.2%}", f"{cell['slower_than_resident']:+.1%}")
    table.caption = "wait: from the end of a step's work to the begin of the next one's; medians of groups of steps"
    return table


def print_peers(console: Console, cells: list[dict[str, Any]]) -> None:
    """One line for each implementation and mode; then what did not run, and why."""
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    table = Table(title="Side by side", title_justify="left")
    left = ("implementation", "mode", "largest error")
    for column in ("implementation", "mode", "ms", "spread", "TFLOPS", "GEMM bound ms", "ratio", "saved MiB", "peak MiB", "largest error"):
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for cell in cells:
        if cell["status"] != "ran":
            continue
        sizes = ((math.inf if error["whole"] is None else error["whole"], name) for name, error in cell["errors"].items())
        largest = max(sizes, default=None)
        table.add_row(
            cell["peer"],
            cell["mode"],
            f"{cell['ms']:.3f}",
            f"{cell['ms_spread']:.3f}",
            f"{cell['tflops']:.3g}",
            f"{cell['bound_ms']:.3f}",
            f"{cell['ratio']:.2f}",
            *("" if cell[key] is None else f"{cell[key]:,.1f}" for key in ("saved_mib", "peak_mib")),
            "" if largest is None else f"{largest[0]:.2e} {largest[1].removesuffix(' inference')}",
        )
    console.print(table)
    for cell in cells:
        if cell["status"] != "ran":
            console.print(f"{cell['peer']}: {cell['why']}", style="yellow", markup=False, highlight=False)
    text = "experts without the router, on the same weights, inputs and routing; the bound is timed in each one's own process"
    console.print(text, style="dim", highlight=False)


def rows_table(rows: Rows) -> Table:
    means = rows.means()
    table = Table(title=f"Rows at tile_m {rows.tile_m}", title_justify="left")
    for column in ("trials", "processed rows", "hardware rows", "wasted ratio"):
        table.add_column(column, justify="right")
    numbers = (f"{means['processed_rows']:,.1f}", f"{means['hardware_rows']:,.1f}", f"{means['wasted_ratio']:.4f}")
    table.add_row(str(means["trials"]), *numbers)
    return table


def title(problem: Problem, machine: dict[str, Any]) -> str:
    described = problem.describe()
    power = f", power limit {machine['power_limit_w']:.0f} W" if machine["power_limit_w"] else ""
    biased = ", bias" if problem.bias else ""
    return (
        f"T,H,I,E,K = {problem.thiek}; routing {described['routing']}; {problem.dtype}; {problem.activation}{biased}, "
        f"{problem.gate_up_layout}; seed {problem.seed}\n"
        f"{described['backend']} backend on {machine['device']}{power}, torch {machine['versions']['torch']}"
    )


def accuracy_cell(problem: Problem, judged: Judged) -> dict[str, Any]:
    errors = {
        name: {key: value if math.isfinite(value) else None for key, value in error._asdict().items()}
        for name, error in judged.errors.items()
    }
    reference = {name: {"max": largest, "mean": mean} for name, (largest, mean) in judged.reference.items()}
    verdict = {"passed": not judged.failures, "why": "; ".join(judged.failures)}
    return {**problem.describe(), "mode": "accuracy", "errors": errors, "reference": reference, **verdict}


def result_json(described: dict[str, Any], cells: list[dict[str, Any]], **more: Any) -> str:
    """The result in the format of recorded results."""
    command = environment.command("sonicmoe", *sys.argv[1:])
    return json.dumps({**described, "command": command, **more, "cells": cells}, indent=2, allow_nan=False)


def print_json(described: dict[str, Any], cells: list[dict[str, Any]], **more: Any) -> None:
    """`result_json` on stdout."""
    print(result_json(described, cells, **more))
