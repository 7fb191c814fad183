"""Worker processes that survive a crashing cell.

Each worker is one process that runs cells until it is told to stop. A worker that dies or runs past its time limit costs
its cell, which is reported with the reason, and is replaced; no other cell notices. So is one whose cell has broken its use of the GPU.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_PR_SET_PDEATHSIG = 1
_CONTEXT = multiprocessing.get_context("spawn")
Work = Callable[[str, int], dict[str, Any]]
LOST = "process_lost"
"""Of a result, where true: its worker can run no other cell."""


@dataclass(frozen=True)
class Job:
    """One cell to run: its name, its random seed, what it will need, and when to give up on it."""

    name: str
    seed: int
    memory_bytes: int
    cost_s: float
    timeout_s: float


@dataclass(frozen=True)
class Started:
    name: str


@dataclass(frozen=True)
class Finished:
    """`result` is None where the worker died; `crash` then says how."""

    name: str
    result: dict[str, Any] | None
    crash: str
    seconds: float


class _Worker:
    def __init__(self, setup: Callable[[], Work], environment: dict[str, str]) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, setup, environment, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.since = 0.0

    def give(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        self.connection.send((job.name, job.seed))

    def stop(self) -> None:
        with contextlib.suppress(OSError, BrokenPipeError):
            self.connection.send(None)
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, setup: Callable[[], Work], environment: dict[str, str], parent: int) -> None:
    """The worker's life. The environment is set before anything heavy is imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _die_with(parent)
    os.environ.update(environment)
    work = setup()
    while (message := connection.recv()) is not None:
        connection.send(work(*message))


def _die_with(parent: int) -> None:
    """A killed run leaves no worker behind, which would hold the GPU while the resumed run times its speed cells there."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def run_jobs(
    jobs: list[Job], setup: Callable[[], Work], *, environments: list[dict[str, str]], memory_bytes: int
) -> Iterator[Started | Finished]:
    """Run jobs on one worker per environment, dearest first, and report each as it starts and ends.

    A job starts when a worker is free and the estimates of all jobs that run on its GPU (on the machine, where there is none) fit in
    `memory_bytes` together; one that alone exceeds the memory runs alone there. `setup` is called once in each worker and must be
    importable there.
    """
    gpus = [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments]
    waiting = sorted(jobs, key=lambda job: (-job.cost_s, job.name))
    workers: list[_Worker | None] = [None] * min(len(environments), len(jobs))
    try:
        while waiting or any(worker and worker.job for worker in workers):
            for index in range(len(workers)):
                worker = workers[index]
                if worker is not None and worker.job is not None:
                    continue
                beside = [other.job for other, gpu in zip(workers, gpus, strict=False) if other and other.job and gpu == gpus[index]]
                job = _next_job(waiting, beside, memory_bytes)
                if job is None:
                    continue
                waiting.remove(job)
                if worker is None:
                    worker = workers[index] = _Worker(setup, environments[index])
                yield Started(job.name)
                worker.give(job)
            for index, finished in _collect(workers):
                if finished.result and finished.result.pop(LOST, False):
                    workers[index].kill()
                    workers[index] = None
                elif finished.crash:
                    workers[index] = None
                yield finished
    finally:
        for worker in workers:
            if worker is not None and worker.job is None:
                worker.stop()
            elif worker is not None:
                worker.kill()


def _next_job(waiting: list[Job], running: list[Job], memory_bytes: int) -> Job | None:
    free = memory_bytes - sum(job.memory_bytes for job in running)
    return next((job for job in waiting if job.memory_bytes <= free or not running), None)


def _collect(workers: list[_Worker | None]) -> Iterator[tuple[int, Finished]]:
    """Wait until a worker answers, dies or runs out of time; yield what happened."""
    busy = {index: worker for index, worker in enumerate(workers) if worker is not None and worker.job is not None}
    deadline = min((worker.since + worker.job.timeout_s for worker in busy.values()), default=0.0)
    wait([worker.connection for worker in busy.values()], timeout=max(0.0, deadline - time.monotonic()) + 0.01)
    for index, worker in busy.items():
        job, seconds = worker.job, time.monotonic() - worker.since
        if worker.connection.poll():
            try:
                result = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join()
                worker.connection.close()
                yield index, Finished(job.name, None, f"the worker died: {_how(worker.process.exitcode)}", seconds)
                continue
            worker.job = None
            yield index, Finished(job.name, result, "", seconds)
        elif seconds > job.timeout_s:
            worker.kill()
            yield index, Finished(job.name, None, f"ran past its limit of {job.timeout_s:g} s and was stopped", seconds)


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit status {exit_code}"
