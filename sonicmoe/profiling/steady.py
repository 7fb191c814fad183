"""The steady state: the part of a trace that the tables are about.

It begins with the first kernel of the first step and ends where the first kernel of the last step begins, so that it holds whole
steps with what lies between them, however far the host runs ahead of the GPU; the last step only closes it. "First kernel" means on
the stream that computes most, among the kernels that the host launched within the step: a prefetched copy may run steps earlier.
With a single step it ends with that step's last activity; without marked steps it is the whole recording.
"""

import bisect
from dataclasses import dataclass

from sonicmoe.profiling.trace import GpuActivity, Step, Trace


@dataclass(frozen=True)
class Steady:
    """Microseconds of the trace; ``steps`` is None where the trace marks none."""

    begin: float
    end: float
    steps: int | None
    first_step: int | None
    """Number of the first step within."""

    @property
    def duration(self) -> float:
        return self.end - self.begin

    @property
    def window(self) -> tuple[float, float]:
        return self.begin, self.end


def find(trace: Trace, *, skip: int = 0) -> Steady:
    """The steady state after the first ``skip`` marked steps.

    Raises:
        ValueError: the trace holds no GPU activity, or not more than ``skip`` steps with some.
    """
    if not trace.gpu:
        raise ValueError("the trace holds no GPU activity")
    if not trace.steps:
        if skip:
            raise ValueError(f"skip={skip}: must be 0 for a trace that marks no steps")
        return Steady(trace.gpu[0].begin, max(one.end for one in trace.gpu), None, None)
    steps = _with_activity(trace)
    if len(steps) <= skip:
        raise ValueError(f"skip={skip}: must be below the {len(steps)} marked steps that launch work on the GPU")
    first, last = steps[skip], steps[-1]
    begin = _first_kernel(first[1], trace)
    if first is last:
        return Steady(begin, max(one.end for one in first[1]), 1, first[0].number)
    return Steady(begin, _first_kernel(last[1], trace), len(steps) - skip - 1, first[0].number)


def _with_activity(trace: Trace) -> list[tuple[Step, list[GpuActivity]]]:
    """Each step with what it launched, without steps that launched nothing."""
    begins = [step.begin for step in trace.steps]
    launched: list[list[GpuActivity]] = [[] for _ in trace.steps]
    for one in trace.gpu:
        launch = trace.launch(one)
        index = bisect.bisect_right(begins, launch.begin if launch else one.begin) - 1
        if index >= 0:
            launched[index].append(one)
    return [(step, own) for step, own in zip(trace.steps, launched, strict=True) if own]


def _first_kernel(activities: list[GpuActivity], trace: Trace) -> float:
    main = busiest_stream(trace)
    kernels = [one for one in activities if one.kind == "kernel" and (one.device, one.stream) == main]
    return min(one.begin for one in kernels or activities)


def busiest_stream(trace: Trace) -> tuple[int, int]:
    """(device, stream) with the most kernel time, with the most activity where there are no kernels."""
    time: dict[tuple[int, int], float] = {}
    for one in trace.gpu:
        time[one.device, one.stream] = time.get((one.device, one.stream), 0.0) + one.duration * (1.0 if one.kind == "kernel" else 1e-6)
    return max(time, key=lambda key: time[key])
