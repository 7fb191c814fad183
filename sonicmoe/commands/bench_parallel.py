"""``sonicmoe bench --expert-parallel N``: judge and time a layer whose experts are spread over processes."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sonicmoe import accuracy, benchmark, environment
from sonicmoe.cases import DTYPES
from sonicmoe.commands import problem as options_of_layer
from sonicmoe.commands import tables
from sonicmoe.parallel import PeerError, judging, launch, measure


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where an error is above its threshold or a process is gone."""
    if args.trials != 1:
        raise ValueError(f"--trials {args.trials}: is for one process, --expert-parallel times one layer's rounds")
    processes = launch.start(args.expert_parallel, args.device, timeout_s=args.timeout, command="bench")
    try:
        code = _run(args, processes)
        processes.leave()
        return code
    except PeerError as error:
        print(f"sonicmoe bench: {error}", file=sys.stderr, flush=True)
        return 1


def _run(args: argparse.Namespace, processes: launch.Processes) -> int:
    args.seed = args.seed or 0  # of all processes
    problem = replace(options_of_layer.read(args, what="timed"), device=processes.device)
    ranks, sizes = processes.expert.size(), problem.thiek
    options: dict[str, Any] = {"transport": args.transport, "chunks": args.chunks}
    if args.transport == "symmetric_memory":
        options |= {"max_tokens": sizes.T, "capacity": args.capacity}
    described = environment.describe(str(processes.device))
    cells, judged = [], None
    if not args.skip_test:
        whole = replace(problem, thiek=sizes._replace(T=sizes.T * ranks))
        benchmark.check(whole, test=True)
        judged = _judge(whole, processes, [sizes.T] * ranks, options)
        cells.append({**tables.accuracy_cell(problem, judged), "name": f"expert_parallel/{ranks}", "ranks": ranks, **options})
    else:
        benchmark.check(problem, test=False)
    cells += measure.measure(problem, processes, **options)
    if processes.rank == 0:
        _report(args, problem, described, cells, judged)
    processes.barrier()
    return 1 if judged and judged.failures else 0


def _judge(problem: benchmark.Problem, processes: launch.Processes, split: list[int], options: dict[str, Any]) -> benchmark.Judged:
    """All processes' results put together, against the oracle on all their tokens."""
    case = problem.make_case()
    got, routing = judging.run(case, processes.expert, split, backend=problem.backend, **options)
    return benchmark.compare(problem, got, case.oracle(routing))


def _report(
    args: argparse.Namespace, problem: benchmark.Problem, described: dict[str, Any], cells: list[dict], judged: benchmark.Judged | None
) -> None:
    result = {**described, "command": environment.command("torchrun", "-m", "sonicmoe", *sys.argv[1:]), "cells": cells}
    text = json.dumps(result, indent=2, allow_nan=False)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
        return
    console = Console()
    console.print(tables.title(problem, described), highlight=False)
    if judged:
        console.print(tables.accuracy_table(judged, accuracy.THRESHOLDS[DTYPES[problem.dtype]]))
    console.print(_table([cell for cell in cells if cell["mode"] != "accuracy"]))


_LINES = (
    ("step, ms", "ms", "{:.3f}"),
    ("step, spread, ms", "ms_spread", "{:.3f}"),
    ("compute, ms", "compute_ms", "{:.3f}"),
    ("exchange alone, ms", "exchange_ms", "{:.3f}"),
    ("exposed exchange, ms", "exposed_ms", "{:.3f}"),
    ("exposed share of the step", "exposed_share", "{:.1%}"),
    ("sent to others, MiB", "sent_mib", "{:.1f}"),
    ("exchange, GB/s", "bus_gb_s", "{:.1f}"),
    ("backend's all-to-all, GB/s", "backend_bus_gb_s", "{:.1f}"),
    ("exchange / backend", "bandwidth_ratio", "{:.2f}"),
    ("TFLOPS of a process", "tflops", "{:.3g}"),
    ("GEMM bound, ms", "bound_ms", "{:.3f}"),
    ("ratio to the bound", "ratio", "{:.2f}"),
)


def _table(cells: list[dict[str, Any]]) -> Table:
    first = cells[0]
    table = Table(title=f"{first['ranks']} processes, {first['transport']}, chunks: {first['chunks']}", title_justify="left")
    table.add_column("")
    for cell in cells:
        table.add_column(cell["mode"], justify="right")
    for label, name, form in _LINES:
        table.add_row(label, *(form.format(cell[name]) if name in cell else "-" for cell in cells))
    table.add_row("peak memory, MiB", *("-" if None in cell["peak_mib"] else f"{max(cell['peak_mib']):.0f}" for cell in cells))
    table.caption = (
        "T is per process; of each sample the slowest process counts; the backend moves as many bytes in equal parts in the same run"
    )
    return table
