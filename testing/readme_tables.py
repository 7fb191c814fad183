"""Writes the README's tables of measured speed from the recorded results: ``python -m testing.readme_tables``.

Recorded results are the JSON files in testing/results/; of each device the newest file that has speed cells is shown. What stands
between the two markers in the README is replaced, and nothing else.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testing.matrix.report import machine_text, thiek_text
from testing.matrix.results import write_atomically

ROOT = Path(__file__).absolute().parent.parent
BEGIN = "<!-- tables of testing/results/, written by `python -m testing.readme_tables`: begin -->"
END = "<!-- end -->"
NONE_RECORDED = "No speed is recorded yet."


def speed_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in result["cells"] if cell.get("ratio") and cell.get("ms")]


def newest(folder: Path) -> list[dict[str, Any]]:
    """Of each device and power limit the newest result that has speed cells, ordered by device.

    Raises:
        ValueError: a file is not a recorded result.
    """
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for key in ("device", "date", "cells"):
            if key not in result:
                raise ValueError(f"{path}: {key} is missing: must be a result that one of the project's commands has written")
        key = str(result["device"]), float(result.get("power_limit_w") or 0)
        if speed_cells(result) and (key not in found or found[key]["date"] < result["date"]):
            found[key] = result
    return [found[key] for key in sorted(found)]


def tables(folder: Path) -> str:
    """The Markdown between the markers."""
    results = newest(folder)
    if not results:
        return NONE_RECORDED + "\n"
    return "\n".join(_table(result) for result in results)


def _table(result: dict[str, Any]) -> str:
    lines = [machine_text(result) + ":", ""]
    lines += ["| T,H,I,E,K | routing | mode | ms | TFLOPS | GEMM bound ms | ratio |", "|---|---|---|--:|--:|--:|--:|"]
    lines += [
        f"| {thiek_text(cell['thiek'])} | {cell.get('routing') or ''} | {cell['mode']} | {cell['ms']:.3f} | {cell['tflops']:.0f} "
        f"| {cell['bound_ms']:.3f} | {cell['ratio']:.2f} |"
        for cell in speed_cells(result)
    ]
    return "\n".join(lines) + "\n"


def updated(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: a marker is missing or stands there twice.
    """
    for marker in (BEGIN, END):
        if readme.count(marker) != 1:
            raise ValueError(f"README.md: has the marker {marker!r} {readme.count(marker)} times: must be there once")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; with --check 1 where the README is not what would be written; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m testing.readme_tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "testing" / "results", metavar="DIR", help="default: testing/results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE", help="default: README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README is out of date")
    parser.add_argument("--json", action="store_true", help="print the results that the tables show as JSON")
    arguments = parser.parse_args(argv)
    try:
        before = arguments.readme.read_text(encoding="utf-8")
        after = updated(before, tables(arguments.results))
        shown = newest(arguments.results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(shown))
    if arguments.check and before != after:
        print(f"{arguments.readme}: is out of date: run python -m testing.readme_tables", file=sys.stderr)
        return 1
    if not arguments.check:
        write_atomically(arguments.readme, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
