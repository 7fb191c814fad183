"""What a run found, as a table."""

import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from testing.matrix.report import machine_text
from testing.matrix.results import FAILED, NOT_RUN, PASSED
from testing.measure.first_call import PARTS
from testing.measure.items import MEASURED

_STYLES = {PASSED: "green", FAILED: "bold red", MEASURED: "dim", NOT_RUN: "yellow"}
_NUMBERS = (
    "bound_ms",
    "floor_ms",
    "inference_ms",
    "forward_ms",
    "eager_ms",
    "host_ms",
    "bincount_ms",
    "reference_ms",
    "top_k_ms",
    "second_ms",
    "import_ms",
    *PARTS,
    "rest_ms",
)
"""Shown beside a cell's time where it has them."""


def console() -> Console:
    """A log file has no width of its own; 80 columns would fold every row of a table."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """One line per cell that was run, then what failed and what was not run, and the verdict."""
    table = Table(title=f"Measured: {', '.join(result['suites'])}", title_justify="left", header_style="bold")
    for column in ("item", "ms", "other ms", "value", "must be", ""):
        table.add_column(column, justify="right" if column == "ms" else "left", overflow="fold")
    for cell in result["cells"]:
        if cell["status"] != NOT_RUN:
            table.add_row(*_row(cell), f"[{_STYLES[cell['status']]}]{cell['status']}[/]")
    console.print(table)
    for cell in result["cells"]:
        if cell["status"] == FAILED:
            console.print(f"failed: {cell['name']}: {cell['why']}", style="red", markup=False, highlight=False)
    for cell in result["cells"]:
        if cell["status"] == NOT_RUN:
            console.print(f"not run: {cell['name']}: {cell['why']}", style="yellow", markup=False, highlight=False)
    console.print(machine_text(result), style="dim", markup=False, highlight=False)
    counts = Counter(cell["status"] for cell in result["cells"])
    failed = counts[FAILED]
    verdict = "FAIL" if failed else "PASS" if counts[PASSED] else "NOTHING JUDGED"
    text = ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
    console.print(f"{verdict}: {text}{' (quick)' if result['quick'] else ''}, seed {result['seed']}", style="bold", highlight=False)


def _row(cell: dict[str, Any]) -> list[str]:
    bound = cell.get("bound") or {}
    value = bound.get("value")
    return [
        cell["name"],
        f"{cell['ms']:.4g}" if cell.get("ms") is not None else "",
        ", ".join(f"{key.removesuffix('_ms')} {cell[key]:.4g}" for key in _NUMBERS if cell.get(key) is not None),
        f"{'not a number' if value is None else f'{value:.4g}'} {bound['unit']}" if bound else "",
        f"{bound['rule']} {bound['limit']:.4g}" if bound else "",
    ]
