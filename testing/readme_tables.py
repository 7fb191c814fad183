"""Writes the documents' tables of measured speed from the recorded results: ``python -m testing.readme_tables``.

Recorded results are the JSON files in testing/results/; of each device and power limit the newest file that has a table's cells
is shown, whatever commit it is of. What stands between the two markers in a document is replaced, and nothing else.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from testing import measured_tables, parallel_tables, transformers_layers
from testing.matrix import history
from testing.matrix.report import machine_text, thiek_text
from testing.matrix.results import write_atomically

ROOT = Path(__file__).absolute().parent.parent
BEGIN = "<!-- tables of testing/results/, written by `python -m testing.readme_tables`: begin -->"
"""In every document the same: each has one place for its tables."""
END = "<!-- end -->"
NONE_RECORDED = "No speed is recorded yet."
NO_PEERS_RECORDED = "No comparison is recorded yet."
NO_INPUT_RECORDED = "No wait for input is recorded yet."


def speed_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of this library's whole layers on one GPU beside the GEMM bound; the suites of testing.measure have none."""
    if "suites" in result:
        return []
    return [cell for cell in result["cells"] if cell.get("ratio") and cell.get("ms") and not {"peer", "ranks"} & cell.keys()]


def peer_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of `sonicmoe bench --peers`; a peer that did not run has no mode."""
    return [cell for cell in result["cells"] if "peer" in cell]


def peer_sizes(result: dict[str, Any]) -> str:
    """One command compares at one size, so each size has results of its own."""
    return " ".join(sorted({thiek_text(cell["thiek"]) for cell in peer_cells(result)}))


class Tables(NamedTuple):
    """What stands between the markers of one document."""

    document: str
    """Path below the root."""
    select: Callable[[dict[str, Any]], list[dict[str, Any]]]
    """A recorded result's cells that are shown; results without any are not for this document."""
    table: Callable[[dict[str, Any]], str]
    """Markdown of one result."""
    none: str = NONE_RECORDED
    """What stands there without any result."""
    apart: Callable[[dict[str, Any]], str] = lambda result: ""
    """Results that differ in this are shown side by side."""
    together: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda results: results
    """Makes one result of those that one table is to show."""

    def newest(self, folder: Path) -> list[dict[str, Any]]:
        return newest(folder, self.select, self.apart)

    def markdown(self, folder: Path) -> str:
        return "\n".join(self.table(result) for result in self.together(self.newest(folder))) or self.none + "\n"


def newest(
    folder: Path,
    select: Callable[[dict[str, Any]], list[dict[str, Any]]] = speed_cells,
    apart: Callable[[dict[str, Any]], str] = lambda result: "",
) -> list[dict[str, Any]]:
    """Of each device and power limit, and of what ``apart`` says, the newest result of which ``select`` takes cells, ordered by device.

    Raises:
        ValueError: a file is not a recorded result.
    """
    found = {(*history.machine_of(result), apart(result)): result for result in history.recorded(folder) if select(result)}
    return [found[key] for key in sorted(found)]


def _table(result: dict[str, Any]) -> str:
    lines = [machine_text(result) + ":", ""]
    lines += ["| T,H,I,E,K | routing | mode | ms | TFLOPS | GEMM bound ms | ratio |", "|---|---|---|--:|--:|--:|--:|"]
    lines += [f"| {_speed_columns(cell)} |" for cell in speed_cells(result)]
    return "\n".join(lines) + "\n"


def _speed_columns(cell: dict[str, Any]) -> str:
    words = f"{thiek_text(cell['thiek'])} | {cell.get('routing') or ''} | {cell['mode']}"
    return f"{words} | {cell['ms']:.3f} | {cell['tflops']:.0f} | {cell['bound_ms']:.3f} | {cell['ratio']:.2f}"


def _peer_table(result: dict[str, Any]) -> str:
    lines = [machine_text(result) + ":", ""]
    lines += [
        "| implementation | T,H,I,E,K | routing | mode | ms | TFLOPS | GEMM bound ms | ratio | saved MiB | peak MiB | largest error |"
    ]
    lines += ["|---|---|---|---|--:|--:|--:|--:|--:|--:|---|"]
    ran = [cell for cell in peer_cells(result) if cell.get("ratio")]
    for cell in ran:
        memory = (f"{cell[key]:.0f}" if cell.get(key) is not None else "" for key in ("saved_mib", "peak_mib"))
        lines.append(f"| {cell['peer']} | {_speed_columns(cell)} | {' | '.join(memory)} | {_largest_error(cell)} |")
    lines += [f"\n{cell['peer']}: {cell['why']}" for cell in peer_cells(result) if cell not in ran]
    return "\n".join(lines) + "\n"


def _largest_error(cell: dict[str, Any]) -> str:
    """Of a mode's whole tensors, and which tensor has it; None stands for an error that is not finite."""
    whole = {name: float("inf") if error["whole"] is None else error["whole"] for name, error in (cell.get("errors") or {}).items()}
    if not whole:
        return ""
    worst = max(whole, key=whole.__getitem__)
    return f"{whole[worst]:.1e} {worst.removesuffix(' inference')}"


def input_cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of `sonicmoe input`."""
    return [cell for cell in result["cells"] if "input_wait_share" in cell]


def _input_table(result: dict[str, Any]) -> str:
    lines = [machine_text(result) + ":", ""]
    lines += [
        "| T,H,I,E,K | input | batch MiB | step ms | wait ms | share of step | slower than resident |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {thiek_text(cell['thiek'])} | {cell['input']} | {cell['batch_mib']:g} | {cell['ms']:.3f} | {cell['input_wait_ms']:.3f} "
        f"| {cell['input_wait_share']:.2%} | {cell['slower_than_resident']:+.1%} |"
        for cell in input_cells(result)
    ]
    return "\n".join(lines) + "\n"


TABLES = (
    Tables("README.md", speed_cells, _table),
    Tables("docs/peers.md", peer_cells, _peer_table, NO_PEERS_RECORDED, peer_sizes),
    Tables("docs/input.md", input_cells, _input_table, NO_INPUT_RECORDED),
    Tables(
        "docs/expert_parallel.md",
        parallel_tables.select,
        parallel_tables.table,
        parallel_tables.NONE_RECORDED,
        parallel_tables.setup,
        parallel_tables.together,
    ),
    Tables("docs/measure.md", measured_tables.select, measured_tables.table, measured_tables.NONE_RECORDED, measured_tables.suites),
    Tables("docs/transformers.md", transformers_layers.select, transformers_layers.table),
)


def updated(text: str, markdown: str, *, document: str) -> str:
    """A document's text with ``markdown`` between its markers.

    Raises:
        ValueError: a marker is missing or stands there twice.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{document}: has the marker {marker!r} {text.count(marker)} times: must be there once")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; with --check 1 where a document is not what would be written; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m testing.readme_tables", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "testing" / "results", metavar="DIR", help="default: testing/results")
    parser.add_argument("--root", type=Path, default=ROOT, metavar="DIR", help="where the documents are (default: this checkout)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a document is out of date")
    parser.add_argument("--json", action="store_true", help="print the results that the tables show as JSON")
    arguments = parser.parse_args(argv)
    stale = {}
    try:
        for tables in TABLES:
            before = (arguments.root / tables.document).read_text(encoding="utf-8")
            after = updated(before, tables.markdown(arguments.results), document=tables.document)
            if before != after:
                stale[arguments.root / tables.document] = after
        shown = {tables.document: tables.newest(arguments.results) for tables in TABLES}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(shown))
    for path, text in stale.items():
        if arguments.check:
            print(f"{path}: is out of date: run python -m testing.readme_tables", file=sys.stderr)
        else:
            write_atomically(path, text)
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
