"""Recorded results: what testing/results/ holds, and how a speed cell's ratio went from record to record."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from testing.matrix.result_types import record_problem


class Entry(NamedTuple):
    """A speed cell in one recorded run."""

    date: str
    commit: str
    ratio: float


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Every recorded result of a folder, oldest first; none where there is no folder.

    Raises:
        ValueError: a file is not a recorded result.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is not JSON: {error}") from None
        for key in ("device", "date", "cells"):
            if not isinstance(result, dict) or key not in result:
                raise ValueError(f"{path}: {key} is missing: must be a result that one of the project's commands has written")
        if problem := record_problem(result):
            raise ValueError(f"{path}: {problem}")
        found.append(result)
    return sorted(found, key=lambda result: result["date"])


def machine_of(result: dict[str, Any]) -> tuple[str, float]:
    """Device and power limit: only results of the same two are compared."""
    return str(result["device"]), float(result.get("power_limit_w") or 0)


def of_cells(records: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, list[Entry]]:
    """Cell name -> its recorded ratios on the result's own device and power limit, oldest first, without the result itself."""
    history: dict[str, list[Entry]] = {}
    if "device" not in result:
        return history
    for record in records:
        same_run = (record["date"], record.get("commit")) == (result.get("date"), result.get("commit"))
        if same_run or machine_of(record) != machine_of(result):
            continue
        for cell in record["cells"]:
            if cell.get("ratio") and cell.get("name"):
                entry = Entry(str(record["date"])[:10], str(record.get("commit"))[:12], cell["ratio"])
                history.setdefault(cell["name"], []).append(entry)
    return history


def change_text(entries: list[Entry], ratio: float) -> str:
    """``0.712 (+1.4 %) 2026-01-02``: the last recorded ratio, by how much the new one differs, and the record's date."""
    if not entries:
        return ""
    last = entries[-1]
    return f"{last.ratio:.3f} ({ratio / last.ratio - 1:+.1%}) {last.date}"
