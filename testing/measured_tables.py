"""docs/measure.md's tables: what `python -m testing.measure` has judged, one line for each kind of item."""

import math
from typing import Any

from testing.matrix.report import machine_text

NONE_RECORDED = "Nothing of it is recorded yet."


def select(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The judged cells of a complete run at full size and of all items of its suites; of others none."""
    if "suites" not in result or result["quick"] or result["items"] or not result["complete"]:
        return []
    return [cell for cell in result["cells"] if cell["passed"] is False or (cell["passed"] and "bound" in cell)]


def suites(result: dict[str, Any]) -> str:
    """What a run is the newest of."""
    return ", ".join(sorted(result["suites"]))


def table(result: dict[str, Any]) -> str:
    """How many items of a kind keep their bound, and the one that is closest to it or furthest beyond."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for cell in select(result):
        kinds.setdefault("/".join(cell["name"].split("/")[:2]), []).append(cell)
    lines = [machine_text(result) + ":", ""]
    lines += ["| what | passed | closest to its bound | must be | item |", "|---|--:|---|---|---|"]
    for kind, cells in kinds.items():
        closest = max(cells, key=_used)
        name, passed = closest["name"].removeprefix(f"{kind}/"), sum(cell["passed"] for cell in cells)
        lines.append(f"| {kind} | {passed} of {len(cells)} | {' | '.join(_texts(closest))} | {name} |")
    return "\n".join(lines) + "\n"


def _used(cell: dict[str, Any]) -> float:
    """How much of its bound a cell uses; what broke has no value."""
    bound = cell.get("bound", {})
    value, limit = bound.get("value"), bound.get("limit")
    return math.inf if value is None else value / limit if limit else value


def _texts(cell: dict[str, Any]) -> tuple[str, str]:
    bound = cell.get("bound", {})
    if bound.get("value") is None:
        return cell["why"].replace("|", "\\|"), ""
    return f"{bound['value']:.4g} {bound['unit']}", f"{bound['rule']} {bound['limit']:.4g}"
