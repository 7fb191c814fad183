"""Copies and memsets by kind, and every copy from pageable host memory with the line of code that made it."""

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from sonicmoe.profiling.steady import Steady
from sonicmoe.profiling.trace import GpuActivity, HostEvent, Trace
from sonicmoe.profiling.work import Peaks

LINE = "sonicmoe line "
"""Begins the name of the range that `lines` puts around a PyTorch call: "sonicmoe line train.py:12 fetch"."""
LEAST_PINNED_BYTES = 2**20
"""A pinned copy below this size is latency, and says nothing of the rate."""
_COPY = re.compile(r"Memcpy (\w+) \((\w+) -> (\w+)\)")
_PYTHON = re.compile(r"(.+\.py)\((\d+)\): (.+)")
_LIBRARY = re.compile(r"(^|/)(torch|contextlib\.py|runpy\.py|threading\.py)(/|$)")


@dataclass(frozen=True)
class MemoryRow:
    """All operations of one kind. Sizes in MB of 10^6 bytes; deviation is the sample's, 0 for a single one."""

    kind: str
    count: int
    total_mb: float
    mean_mb: float
    median_mb: float
    min_mb: float
    max_mb: float
    deviation_mb: float
    total_us: float

    @property
    def gb_per_s(self) -> float | None:
        return self.total_mb * 1e6 / (self.total_us * 1e-6) / 1e9 if self.total_us > 0 else None


@dataclass(frozen=True)
class PageableCopy:
    """One copy from pageable memory to the device.

    Attributes:
        begin_us: in the trace.
        duration_us: on the GPU's timeline.
        host_us: how long the host's call lasted, in which the host can do nothing else; None where the trace has no such call.
        where: the line that made it, "file.py:12 function"; without recorded lines the function, "file.py function (from line 10)";
            empty where the trace has neither.
        operator: PyTorch's operator around the call.
        pinned_us: how long the same bytes take from pinned memory.
    """

    begin_us: float
    bytes: int
    duration_us: float
    host_us: float | None
    where: str
    operator: str
    pinned_us: float

    @property
    def saved_us(self) -> float:
        """What pinning takes off the copy itself; that the host then need not wait comes on top."""
        return max(0.0, self.duration_us - self.pinned_us)


def kind_of(one: GpuActivity) -> str:
    """What the table calls it: "HtoD pageable", "HtoD pinned", "DtoH pageable", ..., "DtoD" or "memset"."""
    if one.kind == "memset":
        return "memset"
    match = _COPY.match(one.name)
    if match is None:
        return one.name
    host = match[2] if match[1] == "HtoD" else match[3] if match[1] == "DtoH" else ""
    return f"{match[1]} {host.lower()}".strip()


def is_pageable_upload(one: GpuActivity) -> bool:
    return one.kind == "memcpy" and kind_of(one) == "HtoD pageable"


def memory_table(trace: Trace, steady: Steady) -> list[MemoryRow]:
    """Copies and memsets that begin in the steady state, by time."""
    groups: dict[str, list[GpuActivity]] = {}
    for one in trace.gpu:
        if one.kind != "kernel" and steady.begin <= one.begin < steady.end:
            groups.setdefault(kind_of(one), []).append(one)
    rows = []
    for kind, own in groups.items():
        sizes = [(one.bytes or 0) / 1e6 for one in own]
        rows.append(
            MemoryRow(
                kind,
                len(sizes),
                sum(sizes),
                statistics.fmean(sizes),
                statistics.median(sizes),
                min(sizes),
                max(sizes),
                statistics.stdev(sizes) if len(sizes) > 1 else 0.0,
                sum(one.duration for one in own),
            )
        )
    return sorted(rows, key=lambda row: -row.total_us)


def pinned_rate(trace: Trace, peaks: Peaks) -> tuple[float, str]:
    """(bytes a second from pinned memory, where the number comes from): as seen in the trace, else the recorder's or the assumed one."""
    pinned = [one for one in trace.gpu if one.kind == "memcpy" and kind_of(one) == "HtoD pinned" and (one.bytes or 0) >= LEAST_PINNED_BYTES]
    seconds = sum(one.duration for one in pinned) * 1e-6
    if seconds > 0:
        return sum(one.bytes or 0 for one in pinned) / seconds, f"seen in {len(pinned)} pinned copies of this trace"
    return peaks.pinned_bytes_per_s, peaks.source


def pageable_copies(trace: Trace, steady: Steady, peaks: Peaks) -> list[PageableCopy]:
    """Every copy from pageable memory that begins in the steady state, in order."""
    rate, _ = pinned_rate(trace, peaks)
    found = []
    for one, line in _with_lines(trace):
        if steady.begin <= one.begin < steady.end:
            launch = trace.launch(one)
            around = list(trace.threads[launch.thread].around(launch.begin)) if launch else []
            found.append(
                PageableCopy(
                    one.begin,
                    one.bytes or 0,
                    one.duration,
                    launch.duration if launch else None,
                    line or where(around),
                    next((event.name for event in around if event.kind == "operator"), ""),
                    (one.bytes or 0) / rate * 1e6,
                )
            )
    return found


def where(around: list[HostEvent]) -> str:
    """The code that made a call, from the events around it, the innermost first; empty where the trace does not say."""
    for event in around:
        if event.kind == "annotation" and event.name.startswith(LINE):
            return event.name.removeprefix(LINE)
    frames = [event.name for event in around if event.kind == "python"]
    for event in around:
        if stack := event.details.get("Call stack"):
            frames += str(stack).split(";")
            break
    for frame in frames:
        match = _PYTHON.fullmatch(frame.strip())
        if match and not _LIBRARY.search(match[1]):
            return f"{match[1]} {match[3]} (from line {match[2]})"
    return ""


def lines_of_copies(trace: Trace) -> list[tuple[int, str]]:
    """(bytes, line) of every pageable copy of a recording with lines, in order: what the recorder keeps of it."""
    found = []
    for one in trace.gpu:
        if is_pageable_upload(one):
            launch = trace.launch(one)
            around = trace.threads[launch.thread].around(launch.begin) if launch else ()
            found.append((one.bytes or 0, where(list(around))))
    return found


def _with_lines(trace: Trace) -> Iterator[tuple[GpuActivity, str]]:
    """Each pageable copy with its line out of the recorder's list of one step: by its place in its step, else by its size."""
    listed = [(int(size), str(line)) for size, line in trace.metadata.get("copy_lines", [])]
    by_size: dict[int, set[str]] = {}
    for size, line in listed:
        by_size.setdefault(size, set()).add(line)
    begins = [step.begin for step in trace.steps]
    steps: dict[int, list[GpuActivity]] = {}
    for one in trace.gpu:
        if is_pageable_upload(one):
            launch = trace.launch(one)
            host = launch.begin if launch else one.begin
            steps.setdefault(sum(begin <= host for begin in begins), []).append(one)
    for own in steps.values():
        alike = [one.bytes or 0 for one in own] == [size for size, _ in listed]
        for index, one in enumerate(own):
            lines = by_size.get(one.bytes or 0, set())
            yield one, listed[index][1] if alike else next(iter(lines)) if len(lines) == 1 else ""
