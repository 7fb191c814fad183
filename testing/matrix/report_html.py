"""The report as one self-contained HTML page: no script, no external file, readable on a laptop and on a phone."""

import math
from html import escape
from typing import Any

from testing.matrix.cells import TENSORS, LayerCell, Matrix, Threshold
from testing.matrix.gate import MISSING
from testing.matrix.report import (
    counts_text,
    experts_text,
    floor_text,
    machine_text,
    no_floor,
    not_run,
    ratio_text,
    share_text,
    shares,
    thiek_text,
)
from testing.matrix.results import FAILED, NO_FLOOR, NOT_RUN, PASSED

_STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #dde2e9; --page: #f5f7fa; --card: #fff; --good: #1a7f4b; --bad: #b3261e; --wait: #8a6100; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--page); }
main { max-width: 1200px; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.badge { color: #fff; border-radius: .4rem; padding: .1rem .6rem; font-size: 1rem; letter-spacing: .04em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8rem; }
.passed { color: var(--good); } .failed, .missing { color: var(--bad); font-weight: 600; }
.not-run, .no-threshold-yet { color: var(--wait); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .83rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .55rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: #eef1f5; font-weight: 600; }
td.n, th.n { text-align: right; } td.why { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.list td:first-child, .list th:first-child { position: sticky; left: 0; background: var(--card); }
.list th:first-child { background: #eef1f5; }
.maps { columns: 2; column-gap: 1rem; }
.map { break-inside: avoid; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.map { margin: 0 0 1rem; padding: .5rem .6rem; }
.map h3 { margin: 0; font-size: .92rem; } .map p { font-size: .78rem; color: var(--soft); margin: 0 0 .3rem; }
.map table { table-layout: fixed; } .map th, .map td { border: 0; padding: 1px; font-size: .72rem; background: none; text-align: center; }
.map th { vertical-align: bottom; line-height: 1.1; font-weight: 600; }
.map th:first-child, .map td:first-child { width: 34%; text-align: left; overflow: hidden; text-overflow: ellipsis; }
.map i { display: block; font-style: normal; border-radius: 3px; padding: .1rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; font-size: .78rem; margin: .4rem 0 .8rem; }
.legend i { font-style: normal; border-radius: 3px; padding: .1rem .5rem; }
@media (max-width: 760px) { main { padding: .8rem; } .maps { columns: 1; } h1 { font-size: 1.25rem; } .tile b { font-size: 1.1rem; } }
"""

_STEPS = (0.25, 0.5, 0.7, 0.85, 1.0)
_COLORS = ("#cdeedd", "#e2f2c6", "#f8efb4", "#fbdcaa", "#f7c1a3", "#b3261e")


def html(matrix: Matrix, result: dict[str, Any], *, passed: bool) -> str:
    """The page for one result, of a shard or merged."""
    badge = f'<span class="badge" style="background:var(--{"good" if passed else "bad"})">{"PASS" if passed else "FAIL"}</span>'
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>SonicMoE matrix: {escape(counts_text(result))}</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>SonicMoE matrix {badge}</h1>",
            f'<p class="soft">{escape(machine_text(result))}</p>',
            _tiles(matrix, result),
            _failures(result),
            _not_run(result),
            _speed(matrix, result),
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


def _table(head: list[tuple[str, str]], rows: list[list[str]]) -> str:
    """head: (label, class of the column); rows: cells that are already HTML."""
    header = "".join(f'<th class="{css}">{escape(label)}</th>' for label, css in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{css}">{value}</td>' for value, (_, css) in zip(row, head, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll list"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _failures(result: dict[str, Any]) -> str:
    rows = [
        [escape(cell["name"]), _status(cell), escape(cell["why"]), thiek_text(cell.get("thiek"))]
        for cell in result["cells"]
        if cell["status"] in (FAILED, MISSING)
    ]
    if not rows:
        return ""
    return f"<h2>What fails</h2>{_table([('cell', ''), ('', ''), ('why', 'why'), ('T,H,I,E,K', '')], rows)}"


def _not_run(result: dict[str, Any]) -> str:
    sections = (("What was not run", not_run(result)), ("What was not judged for speed", no_floor(result)))
    return "".join(f"<h2>{title}</h2>{_reasons(reasons)}" for title, reasons in sections if reasons)


def _reasons(reasons: dict[str, list[str]]) -> str:
    return "".join(
        f'<p><b class="not-run">{len(names)} cells</b>, {escape(why)}: <span class="soft">{escape(", ".join(names))}</span></p>'
        for why, names in reasons.items()
    )


def _speed(matrix: Matrix, result: dict[str, Any]) -> str:
    head = [("cell", ""), ("T,H,I,E,K", ""), *((label, "n") for label in ("ms", "spread", "TFLOPS", "GEMM bound ms", "ratio", "floor"))]
    rows = [
        [
            escape(cell["name"]),
            thiek_text(cell["thiek"]),
            f"{cell['ms']:.3f}",
            f"{cell['ms_spread']:.3f}",
            f"{cell['tflops']:.0f}",
            f"{cell['bound_ms']:.3f}",
            ratio_text(cell),
            escape(floor_text(matrix, result, cell)),
        ]
        for cell in result["cells"]
        if cell.get("ratio")
    ]
    return f"<h2>Speed</h2>{_table(head, rows)}" if rows else ""


def _color(share: float) -> str:
    return next((color for step, color in zip(_STEPS, _COLORS, strict=False) if share <= step), _COLORS[-1])


def _heat_maps(matrix: Matrix, result: dict[str, Any]) -> str:
    """One small table per group: cells down, tensors across, each the larger of its two errors over its limit."""
    layers = {cell.name: cell for cell in matrix.cells if isinstance(cell, LayerCell)}
    groups: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["name"] in layers and cell.get("errors"):
            group, _, name = cell["name"].partition("/")
            groups.setdefault(group, []).append(_heat_row(matrix, layers[cell["name"]], name, cell["errors"]))
    if not groups:
        return ""
    names = "".join(f"<th>{tensor.replace('_', '<br>')}</th>" for tensor in TENSORS)
    legend = "".join(
        f'<i style="background:{color};color:{"#fff" if color == _COLORS[-1] else "inherit"}">{label}</i>'
        for color, label in zip(_COLORS, [*(f"to {step:.0%}" for step in _STEPS), "fails"], strict=True)
    )
    maps = "".join(
        f'<div class="map"><h3>{escape(group)}</h3><p>{escape(matrix.groups[group])}</p>'
        f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        for group, rows in groups.items()
    )
    text = "Error against the float64 oracle as a share of its limit: the larger of the whole tensor's and the worst block's."
    return f'<h2>Accuracy margin</h2><p class="soft">{text}</p><div class="legend">{legend}</div><div class="maps">{maps}</div>'


def _heat_row(matrix: Matrix, cell: LayerCell, name: str, errors: dict[str, Any]) -> str:
    squares = []
    for tensor in TENSORS:
        if tensor not in errors:
            squares.append("<td></td>")
            continue
        limits = matrix.thresholds[cell.dtype][tensor]
        values = [errors[tensor].get(scope) for scope in Threshold._fields]
        share = max(math.inf if value is None else value / limit for value, limit in zip(values, limits, strict=True))
        ink = "#fff" if share > 1 else "inherit"
        title = f"{tensor}: whole {_number(values[0])} of {limits.whole:.1e}, worst block {_number(values[1])} of {limits.worst_block:.1e}"
        text = f"{share:.0%}" if share < 10 else "over"
        squares.append(f'<td><i style="background:{_color(share)};color:{ink}" title="{escape(title)}">{text}</i></td>')
    return f'<tr><td title="{escape(cell.name)}">{escape(name)}</td>{"".join(squares)}</tr>'


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
            escape(cell["name"]),
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
    return f'<h2>All cells</h2><p class="soft">{text}</p>{_table(head, rows)}'
