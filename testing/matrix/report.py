"""Results as people read them: a table for the terminal and Markdown for a job summary. (report_html has the page.)"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from testing.matrix import history
from testing.matrix.cells import LayerCell, Matrix
from testing.matrix.gate import MISSING
from testing.matrix.judge import worst_share
from testing.matrix.results import FAILED, NO_FLOOR, NOT_RUN, PASSED
from testing.matrix.speed import Machine, floor_of, uncertainty

STATUSES = (PASSED, FAILED, MISSING, NO_FLOOR, NOT_RUN)
_STYLES = {PASSED: "green", FAILED: "bold red", MISSING: "bold red", NO_FLOOR: "yellow", NOT_RUN: "yellow"}


def thiek_text(sizes: list[int | None] | None) -> str:
    """Sizes as ``8192,768,256,128,8``; a size that a cell does not have is a dot."""
    return "" if sizes is None else ",".join("·" if size is None else str(size) for size in sizes)


def experts_text(cell: dict[str, Any]) -> str:
    """The sizes at which the experts ran, where they differ from the cell's own."""
    ran = cell.get("thiek_experts")
    if ran is None:
        return ""
    text = "full" if ran == cell["thiek"] else thiek_text(ran)
    return f"{text} tile {cell['tile_m_experts']}" if "tile_m_experts" in cell else text


def shares(matrix: Matrix, result: dict[str, Any]) -> dict[str, float | None]:
    """Cell name -> largest error as a share of its threshold, for layer cells that were measured."""
    by_name = {cell.name: cell for cell in matrix.cells}
    return {
        cell["name"]: worst_share(by_name[cell["name"]], cell, matrix)
        for cell in result["cells"]
        if isinstance(by_name.get(cell["name"]), LayerCell)
    }


def share_text(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}" if share < 100 else "over"


def counts_text(result: dict[str, Any]) -> str:
    """``3 passed, 1 not run``, without the statuses that do not occur."""
    counts = Counter(cell["status"] for cell in result["cells"])
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]) or "no cells"


def machine_text(result: dict[str, Any]) -> str:
    """Where and of what: device, driver, versions, commit, date."""
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items() if version)
    commit = f"commit {str(result.get('commit'))[:12]}{' (dirty)' if result.get('dirty') else ''}"
    power = f"{result['power_limit_w']} W" if result.get("power_limit_w") else ""
    driver = f"driver {result['driver']}" if result.get("driver") else ""
    parts = [str(result.get("device", "unknown device")), driver, power, versions, commit, str(result.get("date", ""))]
    return " · ".join(part for part in parts if part)


def headline(result: dict[str, Any], passed: bool) -> str:
    verdict = "PASS" if passed else "FAIL"
    return f"{verdict}: {counts_text(result)} (profile {result['profile']}, {result['seconds']:.0f} s, seed {result['seed']})"


def print_table(console: Console, matrix: Matrix, result: dict[str, Any], *, passed: bool) -> None:
    """The result table: one line per cell that was run or failed, then what was not run, then the verdict."""
    table = Table(title=f"Matrix, profile {result['profile']}", title_justify="left", header_style="bold")
    for name, justify in (("cell", "left"), ("T,H,I,E,K", "left"), ("experts ran at", "left"), ("routing", "left"), ("dtype", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for name in ("error/limit", "ratio", "s", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("", justify="left")
    share = shares(matrix, result)
    for cell in result["cells"]:
        if cell["status"] == NOT_RUN:
            continue
        table.add_row(
            cell["name"],
            thiek_text(cell.get("thiek")),
            experts_text(cell),
            cell.get("routing") or "",
            cell.get("dtype") or "",
            share_text(share.get(cell["name"])),
            f"{cell['ratio']:.2f}" if cell.get("ratio") else "",
            f"{cell.get('seconds', 0):.1f}",
            f"{cell.get('peak_mib') or 0:.0f}",
            f"[{_STYLES[cell['status']]}]{cell['status']}[/]",
        )
    console.print(table)
    for cell in result["cells"]:
        if cell["status"] in (FAILED, MISSING):
            console.print(f"{cell['status']}: {cell['name']}: {cell['why']}", style="red", markup=False, highlight=False)
    for reason, names in not_run(result).items():
        console.print(f"not run: {len(names)} cells, {reason}: {', '.join(names)}", style="yellow", markup=False, highlight=False)
    for reason, names in no_floor(result).items():
        line = f"speed not judged: {len(names)} cells, {reason}: {', '.join(names)}"
        console.print(line, style="yellow", markup=False, highlight=False)
    console.print(machine_text(result), style="dim", markup=False, highlight=False)
    console.print(headline(result, passed), style="bold green" if passed else "bold red", markup=False, highlight=False)


def not_run(result: dict[str, Any]) -> dict[str, list[str]]:
    """Reason -> names of the cells that were not run for it."""
    return _by_reason(result, NOT_RUN)


def no_floor(result: dict[str, Any]) -> dict[str, list[str]]:
    """Reason -> names of the speed cells that were measured and not judged."""
    return _by_reason(result, NO_FLOOR)


def _by_reason(result: dict[str, Any], status: str) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for cell in result["cells"]:
        if cell["status"] == status:
            reasons.setdefault(cell["why"], []).append(cell["name"])
    return reasons


def markdown(matrix: Matrix, result: dict[str, Any], *, passed: bool, records: Sequence[dict[str, Any]] = ()) -> str:
    """The summary of a GitHub job: verdict, failures, one line per group, speed beside the last record, what was not run."""
    share = shares(matrix, result)
    lines = [f"## Matrix: {headline(result, passed)}", "", machine_text(result), ""]
    broken = [cell for cell in result["cells"] if cell["status"] in (FAILED, MISSING)]
    if broken:
        lines += ["| cell | T,H,I,E,K | status | why |", "|---|---|---|---|"]
        lines += [f"| {cell['name']} | {thiek_text(cell.get('thiek'))} | {cell['status']} | {_escape(cell['why'])} |" for cell in broken]
        lines.append("")
    lines += ["| group | cells | passed | failed | not run or judged | largest error/limit | s |", "|---|--:|--:|--:|--:|--:|--:|"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        groups.setdefault(cell["name"].split("/")[0], []).append(cell)
    for group, cells in groups.items():
        counts = Counter(cell["status"] for cell in cells)
        worst = max((share[cell["name"]] for cell in cells if share.get(cell["name"]) is not None), default=None)
        lines.append(
            f"| {group} | {len(cells)} | {counts[PASSED]} | {counts[FAILED] + counts[MISSING]} | {counts[NOT_RUN] + counts[NO_FLOOR]} "
            f"| {share_text(worst)} | {sum(cell.get('seconds', 0) for cell in cells):.0f} |"
        )
    lines += _speed_lines(matrix, result, history.of_cells(list(records), result))
    for reason, names in not_run(result).items():
        lines += ["", f"Not run, {reason}: {', '.join(names)}."]
    for reason, names in no_floor(result).items():
        lines += ["", f"Speed not judged, {reason}: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def _speed_lines(matrix: Matrix, result: dict[str, Any], past: dict[str, list[history.Entry]]) -> list[str]:
    speed = [cell for cell in result["cells"] if cell.get("ratio")]
    if not speed:
        return []
    columns = ("ms", "spread", "TFLOPS", "GEMM bound ms", "ratio", "floor", "last record", "saved MiB", "peak MiB")
    lines = ["", f"| cell | T,H,I,E,K | {' | '.join(columns)} |", f"|---|---|{'--:|' * len(columns)}"]
    for cell in speed:
        numbers = [f"{cell['ms']:.3f}", f"{cell['ms_spread']:.3f}", f"{cell['tflops']:.0f}", f"{cell['bound_ms']:.3f}", ratio_text(cell)]
        numbers += [floor_text(matrix, result, cell), history.change_text(past.get(cell["name"], []), cell["ratio"])]
        numbers += [f"{cell[key]:.0f}" if cell.get(key) is not None else "" for key in ("saved_mib", "peak_mib")]
        lines.append(f"| {cell['name']} | {thiek_text(cell['thiek'])} | {' | '.join(numbers)} |")
    return lines


def ratio_text(cell: dict[str, Any]) -> str:
    """The ratio to the GEMM bound and what its trials leave uncertain: ``0.712 ± 0.003``."""
    if "trials" not in cell:
        return f"{cell['ratio']:.3f}"
    return f"{cell['ratio']:.3f} ± {uncertainty(cell['ratio_spread'], cell['trials']):.3f}"


def floor_text(matrix: Matrix, result: dict[str, Any], cell: dict[str, Any]) -> str:
    """The recorded ratio that a speed cell is held to, and its date."""
    found = floor_of(matrix.floors, cell["name"], Machine.of(result))
    return f"{found[1].ratio:.3f} ({found[1].date})" if found else "none yet"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
