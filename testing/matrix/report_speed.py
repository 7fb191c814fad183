"""The report's sections on speed and memory: the three loads, ratios, history, roofline.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K rows.
"""

from html import escape
from typing import Any

from testing.matrix import history
from testing.matrix.cells import SPEED_MODES, Matrix, SpeedCell
from testing.matrix.report import floor_text, ratio_text, thiek_text
from testing.matrix.report_charts import OPERATION_COLOURS, roofline, sparkline
from testing.matrix.report_parts import legend, name, square, table
from testing.matrix.roofline import ROOFS, VALUE_BYTES, points
from testing.matrix.speed import Machine, floor_of, uncertainty

LOADS = {"Standard": "speed/standard", "High throughput": "speed/high-throughput", "More experts": "speed/more-experts"}


def sections(matrix: Matrix, result: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """All sections on speed that the result has numbers for."""
    measured = [cell for cell in result["cells"] if cell.get("ratio")]
    past = history.of_cells(records, result)
    parts = [_loads(matrix, result)]
    if measured:
        parts += [_ratios(matrix, result, measured), _speed(matrix, result, measured), _history(measured, past), _memory(measured)]
        parts.append(_roofline(result))
    return "".join(parts)


def _loads(matrix: Matrix, result: dict[str, Any]) -> str:
    """One card for each of the three standard loads, where the matrix has them."""
    known = {cell.name for cell in matrix.cells if isinstance(cell, SpeedCell)}
    by_name = {cell["name"]: cell for cell in result["cells"]}
    cards = []
    for title, prefix in LOADS.items():
        cells = {mode: by_name[f"{prefix}/{mode}"] for mode in SPEED_MODES if f"{prefix}/{mode}" in known & by_name.keys()}
        if cells:
            cards.append(_load(title, cells))
    return f'<h2>The three loads</h2><div class="loads">{"".join(cards)}</div>' if cards else ""


def _load(title: str, cells: dict[str, dict[str, Any]]) -> str:
    first = next(iter(cells.values()))
    rows = []
    for mode, cell in cells.items():
        if cell.get("ratio"):
            texts = (f"{cell['ms']:.3f} ms", f"{cell['tflops']:.0f} TFLOPS", f"{cell['ratio']:.2f}")
            numbers = "".join(f'<td class="n">{text}</td>' for text in texts)
        else:
            numbers = f'<td colspan="3" class="not-run">{escape(": ".join(filter(None, (cell["status"], cell.get("why")))))}</td>'
        rows.append(f"<tr><td>{mode}</td>{numbers}</tr>")
    text = f"T,H,I,E,K = {thiek_text(first['thiek'])}"
    return f'<div class="load"><h3>{escape(title)}</h3><p>{text}</p><table><tbody>{"".join(rows)}</tbody></table></div>'


def _ratios(matrix: Matrix, result: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    """Shapes down, modes across: the ratio to the GEMM bound, coloured by how far below its best it is."""
    by_shape: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in measured:
        shape = cell["name"].removesuffix(f"/{cell['mode']}")
        by_shape.setdefault(shape, {})[cell["mode"]] = cell
    machine = Machine.of(result)
    rows = []
    for shape, modes in by_shape.items():
        squares = []
        for mode in SPEED_MODES:
            cell = modes.get(mode)
            if cell is None:
                squares.append("<td></td>")
                continue
            found = floor_of(matrix.floors, cell["name"], machine)
            lowest = found[1].ratio * (1 - matrix.speed_rule.allowed_loss) if found else None
            title = f"{cell['name']}: {ratio_text(cell)}, floor {floor_text(matrix, result, cell)}"
            granted = uncertainty(cell["ratio_spread"], cell["trials"]) if "trials" in cell else 0.0
            squares.append(square(f"{cell['ratio']:.2f}", _ratio_share(cell["ratio"] + granted, lowest), title))
        rows.append(f'<tr><td title="{escape(shape)}">{name(shape)}</td>{"".join(squares)}</tr>')
    names = "".join(f"<th>{name(mode)}</th>" for mode in SPEED_MODES)
    text = (
        "The GEMM bound's time over the layer's: 1 would be a layer that costs nothing but its products. Coloured by the distance from the "
        "least ratio that passes; where there is no floor yet, by the ratio itself."
    )
    key = legend(["20 % above", "13 %", "8 %", "4 %", "just passes", "fails"])
    body = f'<div class="map"><table><thead><tr><th></th>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f'<h2>Ratio to the GEMM bound</h2><p class="soft">{text}</p>{key}{body}'


def _ratio_share(ratio: float, lowest: float | None) -> float:
    """How near a ratio is to failing, as `report_parts.colour` takes it: 1 at the least that passes, 0.25 at a fifth above it.

    Without a floor nothing fails; a ratio of 1 then has the best colour and a quarter the last one that passes.
    """
    if lowest is None:
        return min(1.0, 1.25 - ratio)
    return 2.0 if ratio < lowest else 1 - 3.75 * (ratio / lowest - 1)


def _speed(matrix: Matrix, result: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    head = [("cell", ""), ("T,H,I,E,K", ""), *((label, "n") for label in ("ms", "spread", "TFLOPS", "GEMM bound ms", "ratio", "floor"))]
    rows = [
        [
            name(cell["name"]),
            thiek_text(cell["thiek"]),
            f"{cell['ms']:.3f}",
            f"{cell['ms_spread']:.3f}",
            f"{cell['tflops']:.0f}",
            f"{cell['bound_ms']:.3f}",
            ratio_text(cell),
            escape(floor_text(matrix, result, cell)),
        ]
        for cell in measured
    ]
    return f"<h2>Speed</h2>{table(head, rows)}"


def _history(measured: list[dict[str, Any]], past: dict[str, list[history.Entry]]) -> str:
    rows = []
    for cell in measured:
        entries = past.get(cell["name"], [])
        if entries:
            best = max(entries, key=lambda entry: entry.ratio)
            last = entries[-1]
            rows.append(
                [
                    name(cell["name"]),
                    sparkline([*(entry.ratio for entry in entries), cell["ratio"]]),
                    f"{cell['ratio']:.3f}",
                    f"{cell['ratio'] / last.ratio - 1:+.1%}",
                    f"{last.ratio:.3f}, {escape(last.date)}, {escape(last.commit)}",
                    f"{best.ratio:.3f}, {escape(best.date)}",
                    str(len(entries)),
                ]
            )
    title = "<h2>History</h2>"
    if not rows:
        return title + '<p class="soft">No run on this device and power limit is recorded in testing/results.</p>'
    head = [
        ("cell", ""),
        ("ratio over time", ""),
        ("now", "n"),
        ("change", "n"),
        ("last record", ""),
        ("best record", ""),
        ("records", "n"),
    ]
    text = "Against the runs recorded in testing/results on this device and power limit."
    return f'{title}<p class="soft">{text}</p>{table(head, rows)}'


def _memory(measured: list[dict[str, Any]]) -> str:
    head = [("cell", ""), ("saved for backward MiB", "n"), ("pre-activation alone MiB", "n"), ("peak MiB", "n")]
    rows = []
    for cell in measured:
        T, _, I, _, K = cell["thiek"]
        z = 2 * T * K * I * VALUE_BYTES / 2**20
        saved, peak = cell.get("saved_mib"), cell.get("peak_mib")
        if saved is not None or peak:
            kept = "" if saved is None else f"{saved:,.1f}"
            rows.append([name(cell["name"]), kept, f"{z:,.1f}", f"{peak:,.0f}" if peak else ""])
    text = "Saved is beyond inputs and parameters; the peak includes weights, inputs and gradients."
    return f'<h2>Memory</h2><p class="soft">{text}</p>{table(head, rows)}' if rows else ""


def _roofline(result: dict[str, Any]) -> str:
    found = list(points(result))
    if not found:
        return ""
    roof = ROOFS.get(str(result.get("device")))
    key = "".join(
        f'<i class="dot" style="--dot:{colour}">{name}</i>'
        for name, colour in OPERATION_COLOURS.items()
        if any(point.operation == name for point in found)
    )
    if roof:
        text = f"The line is what this device reaches: {roof.tflops:.0f} TFLOPS, {roof.tb_per_s:g} TB/s read and written."
    else:
        text = "This device's limits have not been measured, so there is no line."
    head = [("cell", ""), ("operation", ""), *((label, "n") for label in ("ms", "TFLOPS", "FLOPs/byte", "of the roof"))]
    rows = [
        [
            name(point.cell),
            point.operation,
            f"{point.ms:.3f}",
            f"{point.tflops:.0f}",
            f"{point.work.intensity:.0f}",
            f"{point.share(roof):.0%}" if roof else "",
        ]
        for point in found
    ]
    numbers = f"<details><summary>The {len(rows)} dots as numbers</summary>{table(head, rows)}</details>"
    title = f'<h2>Roofline by kernel</h2><p class="soft">One dot for each operation of each speed cell. {text}</p>'
    return f'{title}<div class="legend">{key}</div>{roofline(found, roof)}{numbers}'
