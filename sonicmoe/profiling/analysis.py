"""A trace's tables in one object: `analyse`, a pure function."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from sonicmoe.profiling import gaps, kernels, memory, steady
from sonicmoe.profiling.gaps import Gap, GapRow
from sonicmoe.profiling.intervals import clip, length, union
from sonicmoe.profiling.kernels import KernelRow, OperationRow
from sonicmoe.profiling.memory import MemoryRow, PageableCopy
from sonicmoe.profiling.steady import Steady
from sonicmoe.profiling.trace import Trace
from sonicmoe.profiling.work import H100, Peaks

GPU_TABLES = ("GPU busy share", "kernels", "memory operations", "gaps", "pageable copies")
"""What only a trace with GPU activity has."""
GAP_US = 5.0
"""Least length of a gap that is listed. Kernels that follow each other in a full queue are 1 to 2 microseconds apart."""


@dataclass(frozen=True)
class Busy:
    """One GPU in the steady state, shares of its duration.

    Attributes:
        share: in which any kernel, copy or memset runs: the union of their intervals.
        kernel_share: in which any kernel runs.
        overlap_us: by how much the activities' times exceed their union, because streams ran side by side.
    """

    device: int
    share: float
    kernel_share: float
    overlap_us: float


@dataclass(frozen=True)
class HostRow:
    """An operator by the host's own time in it: without the operators and calls within it."""

    name: str
    count: int
    own_us: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The tables. Of a trace without GPU activity ``steady`` is None, and what follows from the GPU is empty."""

    steady: Steady | None
    step_us: float | None
    """Mean time of a step; without a GPU the median of the host's steps; None where none are marked."""
    operations: list[OperationRow]
    pinned_rate: tuple[float, str]
    host: list[HostRow]
    peaks: Peaks
    busy: list[Busy] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    kernel_us: float = 0.0
    memory: list[MemoryRow] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    gap_causes: list[GapRow] = field(default_factory=list)
    pageable: list[PageableCopy] = field(default_factory=list)

    @property
    def needs_gpu(self) -> tuple[str, ...]:
        """The tables that this trace cannot give."""
        return () if self.steady else GPU_TABLES

    def as_json(self) -> dict[str, Any]:
        """Plain values, for --json and recorded results."""
        plain = asdict(self)
        for row, plain_row in zip(self.pageable, plain["pageable"], strict=True):
            plain_row["saved_us"] = row.saved_us
        return {**plain, "needs_gpu": list(self.needs_gpu)}


def peaks_of(trace: Trace) -> Peaks:
    """The machine's rates: those that the recorder measured, else the assumed ones."""
    recorded = trace.metadata.get("peaks")
    return Peaks(**recorded) if recorded else H100


def analyse(trace: Trace, *, gap_us: float = GAP_US, skip: int = 0) -> Profile:
    """The tables of the trace's steady state.

    Args:
        gap_us: least length of a gap that is listed, microseconds.
        skip: marked steps at the beginning that do not count.

    Raises:
        ValueError: no more than ``skip`` steps.
    """
    peaks = peaks_of(trace)
    window = steady.find(trace, skip=skip) if trace.gpu else None
    shared = {
        "steady": window,
        "operations": kernels.operation_table(trace, window, peaks),
        "pinned_rate": memory.pinned_rate(trace, peaks),
        "host": _host_table(trace),
        "peaks": peaks,
    }
    if window is None:
        host_steps = [step.end - step.begin for step in trace.steps[skip:]]
        return Profile(step_us=statistics.median(host_steps) if host_steps else None, **shared)
    found = gaps.find_gaps(trace, window, least_us=gap_us)
    return Profile(
        step_us=window.duration / window.steps if window.steps else None,
        busy=[_busy(trace, window, device) for device in sorted({one.device for one in trace.gpu})],
        kernels=kernels.kernel_table(trace, window, peaks),
        kernel_us=kernels.kernel_time(trace, window),
        memory=memory.memory_table(trace, window),
        gaps=found,
        gap_causes=gaps.gap_table(found),
        pageable=memory.pageable_copies(trace, window, peaks),
        **shared,
    )


def _busy(trace: Trace, window: Steady, device: int) -> Busy:
    every = clip(((one.begin, one.end) for one in trace.gpu if one.device == device), window.window)
    computing = clip(((one.begin, one.end) for one in trace.gpu if one.device == device and one.kind == "kernel"), window.window)
    busy = length(union(every))
    if window.duration <= 0:
        return Busy(device, 0.0, 0.0, 0.0)
    return Busy(device, busy / window.duration, length(union(computing)) / window.duration, length(every) - busy)


def _host_table(trace: Trace) -> list[HostRow]:
    """Operators, CUDA calls and ranges by own time, over the marked steps, or the whole trace where none are."""
    low, high = (trace.steps[0].begin, trace.steps[-1].end) if trace.steps else (float("-inf"), float("inf"))
    own: dict[str, float] = {}
    count: dict[str, int] = {}
    for thread in trace.threads.values():
        events = [event for event in thread.events if event.kind != "python" and low <= event.begin < high]
        if not events:
            continue
        for event, time in thread.own_time(events[0].begin, min(high, max(event.end for event in events))).items():
            name = _host_name(event.name)
            if low <= event.begin < high:
                own[name] = own.get(name, 0.0) + time
                count[name] = count.get(name, 0) + 1
    return sorted((HostRow(name, count[name], time) for name, time in own.items()), key=lambda row: -row.own_us)


def _host_name(name: str) -> str:
    return "the step's Python" if name.startswith(("ProfilerStep#", memory.LINE)) else name.split(" flops=")[0]
