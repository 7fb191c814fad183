"""docs/expert_parallel.md's table: what `sonicmoe bench --expert-parallel` has recorded, a line for each way of spreading a layer."""

import json
from typing import Any

from testing.matrix import history
from testing.matrix.report import machine_text, thiek_text

NONE_RECORDED = "No run on several GPUs is recorded yet."


def select(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The timed cells of layers whose experts several processes share."""
    return [cell for cell in result["cells"] if cell.get("ranks", 1) > 1 and "exposed_ms" in cell]


def setup(result: dict[str, Any]) -> str:
    """What a run is the newest of."""
    cell = select(result)[0]
    return json.dumps([cell[name] for name in ("ranks", "thiek", "transport", "routing", "chunks")])


def together(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one machine, of the same versions and commit, as one result with the date of the last."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        key = json.dumps([history.machine_of(result), result.get("versions"), result.get("commit"), result.get("dirty")])
        before = found.get(key, {"date": "", "cells": []})
        found[key] = {**result, "date": max(before["date"], result["date"]), "cells": before["cells"] + select(result)}
    return list(found.values())


def table(result: dict[str, Any]) -> str:
    """A line for each cell."""
    lines = [machine_text(result) + ":", ""]
    lines += [
        "| ranks | T,H,I,E,K of a rank | routing | transport | chunks | mode | step, ms | without exchange | exposed | exchange alone, ms |"
    ]
    lines[-1] += " GB/s | of the backend's | ratio |"
    lines += ["|--:|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"]
    for cell in select(result):
        words = (cell["ranks"], thiek_text(cell["thiek"]), cell["routing"], cell["transport"], cell["chunks"], cell["mode"])
        times = f"{cell['ms']:.2f} | {cell['compute_ms']:.2f} | {cell['exposed_share']:.1%} | {cell['exchange_ms']:.2f}"
        bandwidth = f"{cell['bus_gb_s']:.0f} | {cell['bandwidth_ratio']:.2f}"
        lines.append(f"| {' | '.join(map(str, words))} | {times} | {bandwidth} | {cell['ratio']:.2f} |")
    return "\n".join(lines) + "\n"
