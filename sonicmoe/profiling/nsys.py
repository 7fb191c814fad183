"""Nsight Systems around the same steps: the command that is run, and what the process inside does."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from sonicmoe.profiling.stepped import Stepped

REPORTS = ("cuda_gpu_kern_sum", "cuda_gpu_mem_time_sum", "cuda_gpu_mem_size_sum", "cuda_api_sum")
INSIDE = "--inside-nsys"
"""Given to the process that nsys starts."""


def commands(report: Path, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(profile, stats): the two commands for `sonicmoe profile arguments` and a report file without its suffix.

    Only the steps between cudaProfilerStart and cudaProfilerStop are recorded; the host is not sampled, so that it is not slowed down.
    """
    program = [sys.executable, "-m", "sonicmoe", "profile", *arguments, INSIDE]
    options = ["--trace=cuda,nvtx,cublas,osrt", "--sample=none", "--cpuctxsw=none"]
    options += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true", f"--output={report}"]
    stats = ["nsys", "stats", "--force-export=true", *(f"--report={name}" for name in REPORTS), f"{report}.nsys-rep"]
    return ["nsys", "profile", *options, *program], stats


def drive(report: Path, arguments: Sequence[str], *, say: Callable[[str], None]) -> int:
    """Record with nsys and print its summaries; returns its exit code, 0 where all went well.

    Raises:
        ValueError: nsys is not installed.
    """
    if shutil.which("nsys") is None:
        raise ValueError(
            f"nsys={str(report)!r}: nsys is not on PATH: install NVIDIA Nsight Systems (apt install nsight-systems-cli from NVIDIA's "
            "repository), or leave --nsys out and get the same tables from torch.profiler"
        )
    report.parent.mkdir(parents=True, exist_ok=True)
    for command in commands(report, arguments):
        say(shlex.join(command))
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


class CaptureRange(Stepped):
    """Tells nsys when to record: each step after the warm-up, in a range of its own."""

    def __init__(self, *, warmup: int, steps: int) -> None:
        super().__init__(warmup=warmup, steps=steps)
        self._ended = 0
        self._exit = ExitStack()

    def step(self) -> bool:
        import torch

        self._ended += 1
        if self._ended > self.warmup:
            torch.cuda.nvtx.range_pop()
        if self._ended == self.warmup:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            self._exit.enter_context(torch.autograd.profiler.emit_nvtx())
        if self._ended == self.warmup + self.steps:
            self._exit.close()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            return False
        if self._ended >= self.warmup:
            torch.cuda.nvtx.range_push(f"step {self._ended - self.warmup}")
        return True

    def stop(self) -> None:
        self._exit.close()
