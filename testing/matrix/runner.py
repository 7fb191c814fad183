"""Runs a shard's cells in worker processes, shows progress, and writes what was measured so that a killed run resumes."""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from testing.matrix import plan, pool
from testing.matrix.cells import Cell, Matrix, Profile
from testing.matrix.describe import cell_seed, describe, not_run_reason
from testing.matrix.judge import finish
from testing.matrix.located import MatrixError
from testing.matrix.results import FAILED, NOT_RUN, SCHEMA, read_result, write_atomically, write_result
from testing.matrix.sources import fingerprint
from testing.matrix.speed import Machine


@dataclass(frozen=True)
class RunOptions:
    """What the command line asked for."""

    shard_index: int
    shard_count: int
    out: Path
    jobs: int
    seed: int
    pattern: str | None
    resume: bool
    gpus: int
    """sm_90 GPUs to use; 0 in the cpu profile."""
    command: str
    cores: int | None = None
    """Cores that all workers share; None is every core of the machine."""
    first_gpu: int = 0
    """The GPU of the first worker, modulo their number; for runs side by side."""
    quiet: bool = False
    """Without progress, for a run within another command's."""


def shard_path(out: Path, index: int, count: int) -> Path:
    return out / f"shard-{index}-of-{count}.json"


def run_shard(
    matrix: Matrix, profile: Profile, options: RunOptions, setup: Callable[[], pool.Work], environment: dict[str, Any]
) -> dict[str, Any]:
    """Run one shard and write its result; returns that result.

    Args:
        setup: called once in each worker; returns the function (cell name, seed) -> measurements.
        environment: what `sonicmoe.environment.describe` says of this machine.

    Raises:
        MatrixError: the shard does not exist, the folder cannot be written, or there is nothing that can be resumed.
    """
    cells = plan.select(matrix, options.pattern)
    shards = plan.make_shards(cells, profile, options.shard_count)
    if not 1 <= options.shard_index <= options.shard_count:
        raise MatrixError(f"--shard {options.shard_index}/{options.shard_count}: the shards are counted from 1 to {options.shard_count}")
    cells = shards[options.shard_index - 1].cells
    path = shard_path(options.out, options.shard_index, options.shard_count)
    identity = {
        "schema": SCHEMA,
        "profile": profile.name,
        "shard": f"{options.shard_index}/{options.shard_count}",
        "cells_asked": options.pattern or "*",
        "sources": fingerprint(matrix.path),
    }
    journal = _Journal(path, identity, options.seed, resume=options.resume)
    started = time.monotonic()
    with journal:
        results = dict(journal.done)
        runnable = []
        for cell in cells:
            reason = not_run_reason(cell, gpus=options.gpus)
            if reason:
                results[cell.name] = {**describe(cell, profile), "status": NOT_RUN, "passed": None, "why": reason}
            elif cell.name not in results:
                runnable.append(cell)
        progress = Steps(len(cells), already=len(cells) - len(runnable), quiet=options.quiet)
        with progress:
            for result in _measure(matrix, profile, options, runnable, journal.seed, setup, progress, Machine.of(environment)):
                results[result["name"]] = result
                journal.add(result)
                progress.ended(result["name"], result["status"] != FAILED, f"{result['seconds']:.1f} s {result['why']}".rstrip())
        result = {
            **identity,
            **environment,
            "seed": journal.seed,
            "command": options.command,
            "jobs": options.jobs,
            "seconds": round(time.monotonic() - started, 1),
            "cells": [results[cell.name] for cell in cells],
        }
        write_result(path, result)
        journal.remove()
    return result


def _measure(
    matrix: Matrix,
    profile: Profile,
    options: RunOptions,
    cells: list[Cell],
    seed: int,
    setup: Callable[[], pool.Work],
    progress: "Steps",
    machine: Machine,
) -> Iterator[dict[str, Any]]:
    """Yield judged results as cells end; those that need a GPU for themselves come last, one worker per GPU, then those of several."""
    by_name = {cell.name: cell for cell in cells}
    phases = (
        ([cell for cell in cells if cell.gpus == 0], options.jobs, options.gpus),
        ([cell for cell in cells if cell.gpus == 1], options.gpus, options.gpus),
        ([cell for cell in cells if cell.gpus > 1], 1, 0),  # the worker sees all GPUs, and gives its processes one each
    )
    for phase, workers, gpus in phases:
        jobs = [
            pool.Job(
                cell.name,
                cell_seed(seed, cell.name),
                plan.memory_bytes(cell, profile),
                plan.cost_seconds(cell, profile),
                profile.cell_timeout_s,
            )
            for cell in phase
        ]
        environments = [worker_environment(options.first_gpu + index, workers, gpus, options.cores) for index in range(workers)]
        for event in pool.run_jobs(jobs, setup, environments=environments, memory_bytes=int(profile.memory_gib * 2**30)):
            if isinstance(event, pool.Started):
                progress.started(event.name)
                continue
            cell = by_name[event.name]
            measured = {"crash": event.crash} if event.result is None else event.result
            result = {**describe(cell, profile), "seed": cell_seed(seed, cell.name), "seconds": round(event.seconds, 2), **measured}
            yield finish(cell, result, matrix, machine)


def worker_environment(index: int, workers: int, gpus: int, cores: int | None = None) -> dict[str, str]:
    """Each worker has its share of the cores, and one GPU where there are any.

    Its threads sleep while they wait for each other: spinning, on cores that others use as well, made a cell eight times slower.
    """
    threads = str(max(1, (cores or os.cpu_count() or 1) // max(1, workers)))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[index % gpus] if len(visible) >= gpus and visible[0] else str(index % gpus)
    return environment


class _Journal:
    """Finished cells on disk, one JSON line each, until the shard's result replaces them."""

    def __init__(self, result: Path, identity: dict[str, Any], seed: int, *, resume: bool) -> None:
        self.path = result.with_suffix(".partial.jsonl")
        self.identity, self.seed = identity, seed
        self.done: dict[str, dict[str, Any]] = {}
        if resume and result.exists():
            self._take_over(result, read_result(result))
        elif resume and self.path.exists():
            lines = self._read_lines()
            self._take_over(self.path, {**lines[0], "cells": lines[1:]})
        self.stream: TextIO | None = None

    def _read_lines(self) -> list[dict[str, Any]]:
        """All whole lines; the last may be cut off where the run was killed."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if not lines:
            raise MatrixError(f"{self.path}: holds nothing to resume; run again without --resume")
        return lines

    def _take_over(self, path: Path, earlier: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if earlier.get(key) != value:
                raise MatrixError(f"{path}: was made with {key} {earlier.get(key)}, now it is {value}; run again without --resume")
        self.seed = earlier["seed"]
        self.done = {cell["name"]: cell for cell in earlier["cells"]}

    def __enter__(self) -> "_Journal":
        lines = [{**self.identity, "seed": self.seed}, *self.done.values()]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.stream = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take has been reported
            self.stream.close()

    def add(self, result: dict[str, Any]) -> None:
        try:
            self.stream.write(json.dumps(result) + "\n")
            self.stream.flush()
        except OSError as error:
            raise MatrixError(f"{self.path}: cannot be written: {error.strerror}") from None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Steps:
    """A live bar on a terminal, a plain line per step elsewhere; both on stderr."""

    def __init__(self, total: int, *, already: int = 0, quiet: bool = False) -> None:
        self.total, self.count, self.quiet = total, already, quiet
        self.wrong = 0
        self.running: list[str] = []
        console = Console(stderr=True)
        self.bar = None
        if console.is_terminal and not quiet:
            columns = (SpinnerColumn(), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("starting", total=total, completed=already)

    def __enter__(self) -> "Steps":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def started(self, name: str) -> None:
        self.running.append(name)
        self._show()

    def ended(self, name: str, good: bool, line: str) -> None:
        """One step is over; a line that is not good stays on the terminal."""
        self.count += 1
        self.wrong += not good
        if name in self.running:
            self.running.remove(name)
        text = f"{'' if good else 'FAILED '}{name}: {line[:300]}".rstrip(": ")
        if self.bar is None and not self.quiet:
            print(f"[{self.count}/{self.total}] {text}", file=sys.stderr, flush=True)
        elif self.bar and not good:
            self.bar.console.print(text, style="red", markup=False, highlight=False)
        self._show()

    def _show(self) -> None:
        if self.bar:
            failed = f" {self.wrong} failed," if self.wrong else ""
            self.bar.update(self.task, completed=self.count, description=f"{failed} {', '.join(self.running)}")


def default_setup(matrix: Matrix, profile: Profile, device: str) -> Callable[[], pool.Work]:
    """The setup of real workers; a partial of an importable function, so that it can be sent to a new process."""
    return functools.partial(_import_execute, str(matrix.path), profile.name, device)


def _import_execute(matrix_path: str, profile_name: str, device: str) -> pool.Work:
    from testing.matrix.execute import prepare

    return prepare(Path(matrix_path), profile_name, device)
