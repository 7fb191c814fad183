"""The report as one self-contained HTML page: no script, no external file, readable on a laptop and on a phone."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from testing.matrix import report_speed
from testing.matrix.cells import TENSORS, LayerCell, Matrix, Threshold
from testing.matrix.gate import MISSING
from testing.matrix.report import counts_text, experts_text, machine_text, no_floor, not_run, share_text, shares, thiek_text
from testing.matrix.report_parts import STEPS, STYLE, legend, name, square, table
from testing.matrix.results import FAILED, NO_FLOOR, NOT_RUN, PASSED


def html(matrix: Matrix, result: dict[str, Any], *, passed: bool, records: Sequence[dict[str, Any]] = ()) -> str:
    """The page for one result, of a shard or merged.

    Args:
        records: recorded results, oldest first, that speed is compared with.
    """
    badge = f'<span class="badge" style="background:var(--{"good" if passed else "bad"})">{"PASS" if passed else "FAIL"}</span>'
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>SonicMoE matrix: {escape(counts_text(result))}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>SonicMoE matrix {badge}</h1>",
            f'<p class="soft">{escape(machine_text(result))}</p>',
            _tiles(matrix, result),
            _failures(result),
            _not_run(result),
            report_speed.sections(matrix, result, list(records)),
            _heat_maps(matrix, result),
            _all_cells(matrix, result),
            "</main></body></html>",
        ]
    )


def _tiles(matrix: Matrix, result: dict[str, Any]) -> str:
    statuses = [cell["status"] for cell in result["cells"]]
    worst = max((share for share in shares(matrix, result).values() if share is not None), default=None)
    peak = max((cell.get("peak_mib") or 0 for cell in result["cells"]), default=0)
    seed = result["seed"] if isinstance(result["seed"], int) else ", ".join(map(str, result["seed"]))
    broken = statuses.count(FAILED) + statuses.count(MISSING)
    tiles = [
        (statuses.count(PASSED), "passed", "passed"),
        (broken, "failed or missing", "failed" if broken else ""),
        (statuses.count(NOT_RUN), "not run", "not-run" if NOT_RUN in statuses else ""),
        (statuses.count(NO_FLOOR), "without a speed floor", "not-run" if NO_FLOOR in statuses else ""),
        (share_text(worst) or "-", "largest error / limit", ""),
        (f"{result['seconds']:.0f} s", f"profile {result['profile']}", ""),
        (f"{peak:.0f} MiB", "largest worker", ""),
        (seed, "random seed", ""),
    ]
    body = "".join(
        f'<div class="tile"><b class="{css}">{escape(str(value))}</b><span>{escape(label)}</span></div>' for value, label, css in tiles
    )
    return f'<div class="tiles">{body}</div>'


def _failures(result: dict[str, Any]) -> str:
    rows = [
        [name(cell["name"]), _status(cell), escape(cell["why"]), thiek_text(cell.get("thiek"))]
        for cell in result["cells"]
        if cell["status"] in (FAILED, MISSING)
    ]
    if not rows:
        return ""
    return f"<h2>What fails</h2>{table([('cell', ''), ('', ''), ('why', 'why'), ('T,H,I,E,K', '')], rows)}"


def _not_run(result: dict[str, Any]) -> str:
    sections = (("What was not run", not_run(result)), ("What was not judged for speed", no_floor(result)))
    return "".join(f"<h2>{title}</h2>{_reasons(reasons)}" for title, reasons in sections if reasons)


def _reasons(reasons: dict[str, list[str]]) -> str:
    return "".join(
        f'<p><b class="not-run">{len(names)} cells</b>, {escape(why)}: <span class="soft">{escape(", ".join(names))}</span></p>'
        for why, names in reasons.items()
    )


def _heat_maps(matrix: Matrix, result: dict[str, Any]) -> str:
    """One small table per group: cells down, tensors across, each the larger of its two errors over its limit."""
    layers = {cell.name: cell for cell in matrix.cells if isinstance(cell, LayerCell)}
    groups: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["name"] in layers and cell.get("errors"):
            group, _, label = cell["name"].partition("/")
            groups.setdefault(group, []).append(_heat_row(matrix, layers[cell["name"]], label, cell["errors"]))
    if not groups:
        return ""
    names = "".join(f"<th>{tensor.replace('_', '<br>')}</th>" for tensor in TENSORS)
    key = legend([*(f"to {step:.0%}" for step in STEPS), "fails"])
    maps = "".join(
        f'<div class="map"><h3>{escape(group)}</h3><p>{escape(matrix.groups[group])}</p>'
        f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        for group, rows in groups.items()
    )
    text = "Error against the float64 oracle as a share of its limit: the larger of the whole tensor's and the worst block's."
    return f'<h2>Accuracy margin</h2><p class="soft">{text}</p>{key}<div class="maps">{maps}</div>'


def _heat_row(matrix: Matrix, cell: LayerCell, label: str, errors: dict[str, Any]) -> str:
    squares = []
    for tensor in TENSORS:
        if tensor not in errors:
            squares.append("<td></td>")
            continue
        limits = matrix.thresholds[cell.dtype][tensor]
        values = [errors[tensor].get(scope) for scope in Threshold._fields]
        share = max(math.inf if value is None else value / limit for value, limit in zip(values, limits, strict=True))
        title = f"{tensor}: whole {_number(values[0])} of {limits.whole:.1e}, worst block {_number(values[1])} of {limits.worst_block:.1e}"
        squares.append(square(f"{share:.0%}" if share < 10 else "over", share, title))
    return f'<tr><td title="{escape(cell.name)}">{name(label)}</td>{"".join(squares)}</tr>'


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _status(cell: dict[str, Any]) -> str:
    return f'<span class="{cell["status"].replace(" ", "-")}">{cell["status"]}</span>'


def _all_cells(matrix: Matrix, result: dict[str, Any]) -> str:
    share = shares(matrix, result)
    labels = ("T,H,I,E,K", "experts ran at", "routing", "load", "dtype", "activation", "layout")
    head = [("cell", ""), ("", ""), *((label, "") for label in labels), *((label, "n") for label in ("error/limit", "checks", "s", "MiB"))]
    rows = [
        [
            name(cell["name"]),
            _status(cell),
            thiek_text(cell.get("thiek")),
            experts_text(cell),
            escape(cell.get("routing") or ""),
            escape(cell.get("load") or ""),
            escape(cell.get("dtype") or ""),
            escape(f"{cell.get('activation') or ''}{' + bias' if cell.get('bias') else ''}"),
            escape(cell.get("layout") or ""),
            share_text(share.get(cell["name"])),
            str(len(cell["checks"])) if cell.get("checks") else "",
            f"{cell['seconds']:.1f}" if "seconds" in cell else "",
            f"{cell['peak_mib']:.0f}" if cell.get("peak_mib") else "",
        ]
        for cell in result["cells"]
    ]
    text = "Routing and dispatch run at the cell's own sizes; the experts at those of the third column."
    return f'<h2>All cells</h2><p class="soft">{text}</p>{table(head, rows)}'
