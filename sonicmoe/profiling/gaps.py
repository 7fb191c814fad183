"""Gaps on each stream, and what the host did meanwhile.

A gap lies between two activities that follow each other on one stream. Its cause is found from the host call that launched the
second one:

- it came while or after the first activity ran out: the host was late. If a call that waits for the GPU (a synchronisation, a copy to
  or from pageable memory, an allocation or free) was under way when the stream ran empty, it is the cause; else the call or operator
  that took most of the host's time in the gap, or Python outside of them.
- it came in time: the GPU waited. If another stream was busy until the gap's end, for that stream; if the gap is as short as a launch
  takes, or the launching call lasted, for the launch; else for an event whose stream or device the trace does not show.
"""

import bisect
import re
from dataclasses import dataclass

from sonicmoe.profiling.intervals import uncovered, union
from sonicmoe.profiling.kernels import short_name
from sonicmoe.profiling.memory import where
from sonicmoe.profiling.steady import Steady
from sonicmoe.profiling.trace import GpuActivity, HostEvent, Trace
from sonicmoe.profiling.work import PREFIX

HOST_WAITS, HOST_WORKS, OTHER_STREAM, LAUNCH, EVENT, GRAPH, UNKNOWN = (
    "host waits for the GPU",
    "host works",
    "other stream",
    "launch",
    "event",
    "within a CUDA graph",
    "no host call in the trace",
)
_BLOCKING = re.compile(
    r"Synchronize|^cu(da)?(Memcpy(?!.*Async)|Malloc|MemAlloc|Free|MemFree|HostAlloc|HostRegister)|cu(da)?EventElapsedTime"
)
_NEAR_US = 10.0
"""Within which a stream counts as having waited for another one's end."""
_LAUNCH_US = 20.0
"""Longest gap that a launch in time explains by itself."""
_OUTSIDE = "Python outside of PyTorch's operators"


@dataclass(frozen=True)
class Gap:
    """One gap, in microseconds of the trace.

    Attributes:
        idle_us: the part of it in which no stream of the device was busy.
        before, after: names of the activities around it.
        kind: how it came about, one of this module's constants.
        call: the host call that caused it; the other stream's activity for `OTHER_STREAM`.
        operator: PyTorch's operator or the layer's operation in which that call was made.
        where: line of code or function, where the trace has it.
    """

    device: int
    stream: int
    begin_us: float
    duration_us: float
    idle_us: float
    before: str
    after: str
    kind: str
    call: str
    operator: str
    where: str


@dataclass(frozen=True)
class GapRow:
    """All gaps of one cause on one stream."""

    device: int
    stream: int
    kind: str
    call: str
    operator: str
    count: int
    total_us: float
    idle_us: float
    longest_us: float


def find_gaps(trace: Trace, steady: Steady, *, least_us: float) -> list[Gap]:
    """Gaps of at least ``least_us`` within the steady state, in order of time."""
    streams: dict[tuple[int, int], list[GpuActivity]] = {}
    devices: dict[int, list[GpuActivity]] = {}
    for one in trace.gpu:
        streams.setdefault((one.device, one.stream), []).append(one)
        devices.setdefault(one.device, []).append(one)
    busy = {device: union((one.begin, one.end) for one in own) for device, own in devices.items()}
    causes = {device: _Causes(trace, own) for device, own in devices.items()}
    found = []
    for (device, stream), own in streams.items():
        last = own[0]
        for one in own[1:]:
            begin, end = max(last.end, steady.begin), min(one.begin, steady.end)
            if end - begin >= least_us:
                cause = causes[device].of(last, one)
                names = short_name(last.name), short_name(one.name)
                found.append(Gap(device, stream, begin, end - begin, uncovered((begin, end), busy[device]), *names, *cause))
            if one.end > last.end:
                last = one
    return sorted(found, key=lambda gap: gap.begin_us)


def gap_table(gaps: list[Gap]) -> list[GapRow]:
    """Gaps by cause, those in which the whole device idles longest first."""
    groups: dict[tuple[int, int, str, str, str], list[Gap]] = {}
    for gap in gaps:
        groups.setdefault((gap.device, gap.stream, gap.kind, gap.call, gap.operator), []).append(gap)
    rows = [
        GapRow(
            *key,
            count=len(own),
            total_us=sum(gap.duration_us for gap in own),
            idle_us=sum(gap.idle_us for gap in own),
            longest_us=max(gap.duration_us for gap in own),
        )
        for key, own in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.idle_us, -row.total_us))


class _Causes:
    """Finds causes on one device; what all gaps share is prepared once."""

    def __init__(self, trace: Trace, activities: list[GpuActivity]) -> None:
        self.trace = trace
        self.by_end = sorted(activities, key=lambda one: one.end)
        copies = [one for one in activities if one.kind == "memcpy" and "Pageable" in one.name]
        self.pageable = {one.correlation for one in copies} - {None}

    def of(self, last: GpuActivity, one: GpuActivity) -> tuple[str, str, str, str]:
        """(kind, call, operator, where) of the gap between two activities that follow each other on a stream."""
        launch, earlier = self.trace.launch(one), self.trace.launch(last)
        if launch is None:
            return UNKNOWN, "", "", ""
        if earlier is launch:
            return GRAPH, launch.name, *self._context(launch)
        # The GPU begins a copy from pageable memory only when the host has filled its staging buffer.
        if launch.begin < last.end and not (launch.correlation in self.pageable and launch.end > last.end):
            return self._on_device(last, one, launch)
        if waiting := self._waiting(launch, earlier, last):
            return HOST_WAITS, waiting.name, *self._context(waiting)
        return HOST_WORKS, *self._longest(launch, earlier, last.end)

    def _on_device(self, last: GpuActivity, one: GpuActivity, launch: HostEvent) -> tuple[str, str, str, str]:
        """The launch was there in time: another stream that ends where the gap ends, the launch's own latency, or an event."""
        first = bisect.bisect_left(self.by_end, one.begin - _NEAR_US, key=lambda other: other.end)
        for other in reversed(self.by_end[first : bisect.bisect_right(self.by_end, one.begin + 1.0, key=lambda other: other.end)]):
            if other.stream != one.stream and other.end - max(other.begin, last.end) >= (one.begin - last.end) / 2:
                return OTHER_STREAM, f"stream {other.stream}: {short_name(other.name)}", *self._context(launch)
        gap, calling = one.begin - last.end, min(launch.end, one.begin) - last.end
        return LAUNCH if gap <= _LAUNCH_US or calling >= gap / 2 else EVENT, launch.name, *self._context(launch)

    def _waiting(self, launch: HostEvent, earlier: HostEvent | None, last: GpuActivity) -> HostEvent | None:
        """The last call up to the launch that waits for the GPU and was under way when the stream ran empty."""
        since = earlier.begin if earlier else last.begin
        found = None
        for thread in {event.thread for event in (launch, earlier) if event}:
            for event in self.trace.threads[thread].during(since, launch.begin):
                waits = event.kind == "runtime" and (_BLOCKING.search(event.name) or event.correlation in self.pageable)
                if waits and event.begin <= last.end <= event.end + _NEAR_US and (found is None or event.end > found.end):
                    found = event
        return launch if found is None and launch.correlation in self.pageable else found

    def _longest(self, launch: HostEvent, earlier: HostEvent | None, empty: float) -> tuple[str, str, str]:
        """What took most of the host's time from when the stream ran empty to the end of the launch: (call, operator, where)."""
        own = self.trace.threads[launch.thread].own_time(empty, launch.end)
        free = launch.end - empty - sum(own.values())
        if earlier is not None and earlier.thread != launch.thread and free > 0:
            # The launching thread may have been handed its work by the other one, as autograd's is by the main thread.
            others = self.trace.threads[earlier.thread].own_time(empty, launch.end)
            scale = min(1.0, free / max(sum(others.values()), 1e-9))
            own |= {event: time * scale for event, time in others.items()}
            free -= sum(others.values()) * scale
        names: dict[str, float] = {_OUTSIDE: max(0.0, free)}
        example: dict[str, HostEvent] = {}
        for event, time in own.items():
            label = _OUTSIDE if event.kind == "annotation" and event.name.startswith("ProfilerStep#") else event.name.split(" flops=")[0]
            names[label] = names.get(label, 0.0) + time
            example.setdefault(label, event)
        label = max(names, key=lambda name: names[name])
        return label, *self._context(example.get(label, launch))

    def _context(self, event: HostEvent) -> tuple[str, str]:
        """(operator or operation around an event, line or function)."""
        around = [one for one in self.trace.threads[event.thread].around(event.begin) if one is not event]
        named = [one for one in around if one.kind == "operator" or (one.kind == "annotation" and one.name.startswith(PREFIX))]
        return (named[0].name.split(" flops=")[0] if named else ""), where([event, *around])
