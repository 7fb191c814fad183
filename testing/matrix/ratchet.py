"""Proposes floors for the speed cells from recorded results, as an edit of the matrix file that keeps everything else.

A floor is the median of the recorded ratios, lowered where one of these runs would fail by it. A ratchet only tightens: a floor
that would fall is proposed only when asked for.
"""

import decimal
import difflib
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from testing.matrix.cells import Matrix, SpeedCell
from testing.matrix.located import LocatedDict, MatrixError, load
from testing.matrix.results import NO_FLOOR, PASSED
from testing.matrix.speed import Floor, Floors, Machine, is_own

SECTION = "floors"


class Proposal(NamedTuple):
    """A new floor for one cell; `old` is None where the device had none."""

    machine: Machine
    name: str
    old: Floor | None
    new: Floor
    runs: int


def propose(matrix: Matrix, results: list[dict[str, Any]], *, lower: bool = False) -> list[Proposal]:
    """Floors from the speed cells of these results, device by device; with `lower` also those that fall."""
    speed_cells = {cell.name for cell in matrix.cells if isinstance(cell, SpeedCell)}
    found: dict[tuple[Machine, str], list[tuple[str, dict[str, Any]]]] = {}
    for result in results:
        for cell in result["cells"]:
            if cell["name"] in speed_cells and cell["status"] in (PASSED, NO_FLOOR):
                found.setdefault((Machine.of(result), cell["name"]), []).append((str(result.get("date", ""))[:10], cell))
    proposals = []
    for (machine, name), measured in found.items():
        block = next((block for block in matrix.floors if is_own(block, machine)), None)
        old = block.cells.get(name) if block else None
        new = _floor(measured, matrix.speed_rule.allowed_loss)
        if old is None or new.ratio > old.ratio or (lower and new.ratio < old.ratio):
            proposals.append(Proposal(machine, name, old, new, len(measured)))
    return proposals


def _floor(measured: list[tuple[str, dict[str, Any]]], allowed_loss: float) -> Floor:
    def between(values: list[float]) -> float:
        return min(statistics.median(values), min(values) / (1 - allowed_loss))

    cells = [cell for _, cell in measured]
    names = [name for name in cells[0]["kernels"] if all(name in cell["kernels"] for cell in cells)]
    kernels = {name: _digits(between([cell["kernels"][name]["ratio"] for cell in cells])) for name in names}
    ratio, tflops = (between([cell[key] for cell in cells]) for key in ("ratio", "tflops"))
    return Floor(
        _digits(ratio), _digits(tflops), {name: _digits(value) for name, value in kernels.items()}, max(date for date, _ in measured)
    )


def _digits(value: float) -> float:
    """Four digits, rounded down, so that the runs behind a floor still pass by it."""
    return float(decimal.Context(prec=4, rounding=decimal.ROUND_DOWN).create_decimal(repr(value)))


def floors_of(proposals: list[Proposal]) -> list[Floors]:
    """The proposals as the blocks that the matrix file would hold."""
    machines = dict.fromkeys(proposal.machine for proposal in proposals)
    return [
        Floors(*machine, {proposal.name: proposal.new for proposal in proposals if proposal.machine == machine}) for machine in machines
    ]


def edited(path: Path, floors: list[Floors], proposals: list[Proposal]) -> str:
    """The matrix file's text with the proposals in it: a cell's line is replaced or added, all other lines stay.

    Raises:
        MatrixError: the section of the floors is not the last one, where new devices are added.
    """
    root = load(path)
    if max(root.lines, key=root.lines.get) != SECTION:
        raise MatrixError(f"{path}:{root.lines[SECTION]}: {SECTION}: must be the last section of the file for ratchet to add to it")
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    added: dict[int, list[str]] = {}
    new_blocks: dict[Machine, list[str]] = {}
    for proposal in proposals:
        text = f"      {proposal.name}: {_flow(proposal.new)}"
        index = next((index for index, block in enumerate(floors) if is_own(block, proposal.machine)), None)
        if index is None:
            new_blocks.setdefault(proposal.machine, []).append(text)
            continue
        cells: LocatedDict = root[SECTION][index]["cells"]
        if proposal.name in cells:
            lines[cells.lines[proposal.name] - 1] = text
        else:
            added.setdefault(max(cells.lines.values()), []).append(text)
    for line in sorted(added, reverse=True):
        lines[line:line] = added[line]
    for machine, texts in new_blocks.items():
        power = "null" if machine.power_limit_w is None else f"{machine.power_limit_w:g}"
        lines += [f"  - device: {machine.device}", f"    power_limit_w: {power}", "    cells:", *texts]
    return "\n".join(lines) + "\n"


def _flow(floor: Floor) -> str:
    kernels = ", ".join(f"{name}: {value:g}" for name, value in floor.kernels.items())
    return f"{{ratio: {floor.ratio:g}, tflops: {floor.tflops:g}, date: {floor.date}, kernels: {{{kernels}}}}}"


def patch(path: Path, text: str) -> str:
    """The edit as a unified diff."""
    before, name = path.read_text(encoding="utf-8"), f"{path.resolve().parent.name}/{path.name}"
    return "".join(difflib.unified_diff(before.splitlines(True), text.splitlines(True), f"a/{name}", f"b/{name}"))


def as_json(proposal: Proposal) -> dict[str, Any]:
    old = None if proposal.old is None else proposal.old._asdict()
    return {"name": proposal.name, **proposal.machine._asdict(), "old": old, "new": proposal.new._asdict(), "runs": proposal.runs}


def print_table(console: Console, proposals: list[Proposal]) -> None:
    """What would change, floor by floor."""
    if not proposals:
        console.print("no floor would change", highlight=False)
        return
    table = Table(title="Proposed floors", title_justify="left")
    for column in ("cell", "device", "runs", "ratio now", "ratio", "TFLOPS"):
        table.add_column(column, justify="left" if column in ("cell", "device") else "right", overflow="fold")
    for proposal in proposals:
        before = "none" if proposal.old is None else f"{proposal.old.ratio:.3f}"
        device, power = proposal.machine
        where = device if power is None else f"{device}, {power:g} W"
        table.add_row(proposal.name, where, str(proposal.runs), before, f"{proposal.new.ratio:.3f}", f"{proposal.new.tflops:.0f}")
    console.print(table)
