"""``sonicmoe doctor``: works where torch, the compiler, the driver or rich is missing or broken."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

from sonicmoe.doctor.checks import run_checks
from sonicmoe.doctor.findings import Finding, UnavailableError, exit_code
from sonicmoe.doctor.free_gpu import free_gpu
from sonicmoe.doctor.machine import Machine

DESCRIPTION = """Check disk, packages, driver, GPU and one kernel, and say what to do about what is wrong. Exit code 0 when nothing
failed, 1 when a check failed, 2 for warnings with --strict."""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="print the findings as JSON on stdout")
    parser.add_argument("--strict", action="store_true", help="exit code 2 where there are warnings")
    parser.add_argument("--free-gpu", action="store_true", help="only show which processes hold GPU memory, and ask to stop them")
    parser.add_argument("--yes", action="store_true", help="with --free-gpu: stop them without asking")


def run(args: argparse.Namespace, machine: Machine | None = None) -> int:
    """Returns the exit code; with --free-gpu 0 when no process holds GPU memory afterwards, else 1."""
    machine = machine or Machine()
    if args.yes and not args.free_gpu:
        raise ValueError("--yes: must come with --free-gpu")
    if args.free_gpu:
        return _free_gpu(args, machine)
    findings = run_checks(machine, on_check=_progress)
    _progress("")
    code = exit_code(findings, strict=args.strict)
    if args.json:
        counts = Counter(finding.status for finding in findings)
        print(json.dumps({"findings": [asdict(one) for one in findings], "counts": counts, "exit_code": code}, indent=2))
    else:
        _print(findings)
    return code


def _progress(name: str) -> None:
    """One line that is overwritten, without rich, which may be what is broken."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{f'checking {name} ...' if name else ''}", end="", file=sys.stderr, flush=True)


def _print(findings: list[Finding]) -> None:
    try:
        table = _rich_table(findings)
    except Exception:  # a broken rich is a finding of the imports check; here it only costs the table
        table = _print_plain
    table(findings)
    counts = Counter(finding.status for finding in findings)
    print(", ".join(f"{counts[status]} {status}" for status in _COLOURS if counts[status]))


def _rich_table(findings: list[Finding]) -> Callable[[list[Finding]], None]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "finding", "what to do")
    for one in findings:
        table.add_row(one.name, Text(one.status, style=_COLOURS[one.status]), Text(one.message), Text(one.remedy))
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return lambda _: console.print(table)


def _print_plain(findings: list[Finding]) -> None:
    for one in findings:
        print(f"{one.status:<8} {one.name:<9} {one.message}")
        if one.remedy:
            print(f"{'':<18} -> {one.remedy}")


def _free_gpu(args: argparse.Namespace, machine: Machine) -> int:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if not args.json:
            print(line, flush=True)

    def confirm(count: int) -> bool:
        if args.yes:
            return True
        if args.json or not sys.stdin.isatty():
            return False
        question = f"Stop {'this process' if count == 1 else f'these {count} processes'} (SIGTERM, after 10 s SIGKILL)? [y/N] "
        return input(question).strip().lower() in ("y", "yes")

    try:
        free = free_gpu(machine, confirm=confirm, say=say)
    except UnavailableError as error:
        say(f"{error}: {error.remedy}")
        free = False
    if args.json:
        print(json.dumps({"free": free, "messages": said}, indent=2))
    return 0 if free else 1
