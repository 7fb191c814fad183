"""Suite ``sanitizer``: the cases of sanitized.py under compute-sanitizer's memcheck, racecheck and synccheck, several at a time.

An item is one process, most of whose time is its start. It passes where its values were right and the tool counts no error.
"""

import functools
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from testing.measure import sanitized
from testing.measure.items import NEEDS_GPU, Bound, Item, Options, cell
from testing.measure.start import failure, run_child

SANITIZER = "compute-sanitizer"
_ERRORS = r"ERROR SUMMARY: (\d+) errors?$"
TOOLS = {
    "racecheck": r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)$",
    "memcheck": _ERRORS,
    "synccheck": _ERRORS,
}
"""With the line of each that says how many errors there were; first the one that takes longest."""
ENVIRONMENT = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
"""A tensor has an allocation of its own, so that reading beyond its end is an error."""
KERNELS = "kns=kernel_cutlass"
"""What is checked: kernels with this in their name, which are the project's. PyTorch's, which compute what is expected, take most of the
time under a tool."""
CONTROL = "beyond"
"""The case whose fault memcheck must find, of `sanitized.FAULTS`: else the tools check nothing."""
QUICK_CASE = "plan"
"""The one case of --quick."""
PROCESSES = 10
"""At a time."""
LONGEST_NAME = 40


class Found(NamedTuple):
    """What a tool reports."""

    count: int
    """Errors or hazards."""
    first: str
    """The first report in one line; empty where there is none."""


def items(options: Options) -> list[Item]:
    pool, why = ThreadPoolExecutor(PROCESSES), _no_sanitizer(options)
    found = []
    for tool in TOOLS:
        for case in (QUICK_CASE,) if options.quick else sanitized.CASES:
            begin = functools.cache(functools.partial(pool.submit, _checked, options, tool, case))
            run = functools.partial(_wait, pool, begin)
            found.append(Item(f"sanitizer/{tool}/{case}", run, why, None if why else begin))
    return [*found, Item("sanitizer/memcheck/control", functools.partial(_control, options), why)]


def _no_sanitizer(options: Options) -> str:
    """Why nothing can be run here."""
    if options.backend != "hopper":
        return NEEDS_GPU
    return "" if shutil.which(SANITIZER) else f"{SANITIZER} is not on PATH"


def _wait(pool: ThreadPoolExecutor, begin: Callable[[], Future]) -> list[dict[str, Any]]:
    try:
        return begin().result()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _checked(options: Options, tool: str, case: str) -> list[dict[str, Any]]:
    """The cell of one process.

    Raises:
        NotRunError: it found a kernel neither prebuilt nor in the cache, and has no compiler or no C compiler.
        RuntimeError: it failed otherwise and the tool has no report, or it or the tool did not come to an end.
    """
    begin = time.perf_counter()
    done = _ended(options, tool, case)
    found = read(tool, done.stdout)
    right = not done.returncode and sanitized.RIGHT in done.stdout.splitlines()
    if not right and not (found and found.count):
        raise failure(done)
    if found is None:
        raise RuntimeError(f"{tool} printed no summary")
    bound = Bound(found.count, "hazards" if tool == "racecheck" else "errors", 0, "at most", everywhere=True)
    seconds = time.perf_counter() - begin
    return [cell(options, f"sanitizer/{tool}/{case}", mode=tool, bound=bound, why=found.first, dtype=None, process_s=seconds)]


def _control(options: Options) -> list[dict[str, Any]]:
    """The cell of a kernel that reads what is not there.

    Raises:
        RuntimeError: the tool has no report at all, or it or the process did not come to an end.
    """
    done = _ended(options, "memcheck", CONTROL)
    found = read("memcheck", done.stdout)
    if found is None:
        raise failure(done)
    bound = Bound(0 if found.count else 1, "planted faults not found", 0, "at most", everywhere=True)
    return [cell(options, "sanitizer/memcheck/control", mode="memcheck", bound=bound, dtype=None)]


def _ended(options: Options, tool: str, case: str) -> subprocess.CompletedProcess:
    """A case under a tool, when it has ended."""
    child = [sys.executable, "-m", "testing.measure.sanitized", case, str(options.device), str(options.seed)]
    command = [SANITIZER, "--tool", tool, "--print-limit", "3", "--kernel-name", KERNELS, *child]
    try:
        done = run_child(command, 2 * sanitized.TIMEOUT_S, ENVIRONMENT.get(tool, {}))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {2 * sanitized.TIMEOUT_S} s") from None
    if sanitized.STOPPED in done.stderr:
        raise RuntimeError(f"not done after {sanitized.TIMEOUT_S} s")
    return done


def read(tool: str, output: str) -> Found | None:
    """What a tool printed; None where it has no summary."""
    summaries = re.findall(TOOLS[tool], output, re.MULTILINE)
    if not summaries:
        return None
    numbers = [int(number) for number in summaries[-1]] if tool == "racecheck" else [int(summaries[-1])]
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    reports = [line for line in lines if line and "SUMMARY:" not in line and line != SANITIZER.upper()]
    first = reports[:2] if len(reports) > 1 and reports[1].startswith(("at ", "and ")) else reports[:1]
    # Hazards of racecheck are errors, warnings and infos; those beyond the print limit are in one number or the other.
    return Found(max(numbers[0], sum(numbers[1:])), _short(" ".join(first)) if any(numbers) else "")


def _short(report: str) -> str:
    """Without folders, and without the end of mangled names."""
    return re.sub(rf"(\w{{{LONGEST_NAME}}})\w+", r"\1...", re.sub(r"(?<![\w.])/[^\s:]*/", "", report))
