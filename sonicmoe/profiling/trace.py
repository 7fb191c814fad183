"""A recorded trace, read from the Chrome JSON that torch.profiler (Kineto) writes. Times are microseconds, see `first_time`.

What is read, by category: ``kernel``, ``gpu_memcpy`` and ``gpu_memset`` are the GPU's activities; ``cuda_runtime`` and
``cuda_driver`` the host's calls, tied to the activities that they launched by a correlation number; ``cpu_op`` PyTorch's
operators; ``user_annotation`` named ranges, among them ``ProfilerStep#N``; ``python_function`` Python calls of ``with_stack``.
"""

import bisect
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

GPU_KINDS = {"kernel": "kernel", "gpu_memcpy": "memcpy", "memcpy": "memcpy", "gpu_memset": "memset", "memset": "memset"}
HOST_KINDS = {
    "cuda_runtime": "runtime",
    "cuda_driver": "runtime",
    "runtime": "runtime",
    "cpu_op": "operator",
    "operator": "operator",
    "user_annotation": "annotation",
    "python_function": "python",
}
METADATA = "sonicmoe"
"""Our own key beside ``traceEvents``: what the recorder knows and no event says."""
_STEP = re.compile(r"ProfilerStep#(\d+)")


class Thread(NamedTuple):
    """A host thread, as the trace names it."""

    pid: int | str
    tid: int | str


@dataclass(frozen=True, slots=True)
class GpuActivity:
    """One kernel, copy or memset on the GPU; ``bytes`` is None for kernels."""

    kind: str
    name: str
    begin: float
    end: float
    device: int
    stream: int
    correlation: int | None
    bytes: int | None = None

    @property
    def duration(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, eq=False)
class HostEvent:
    """A host call, operator, annotation or Python function; ``details`` holds the arguments that the trace gives of it."""

    kind: str
    name: str
    begin: float
    end: float
    thread: Thread
    correlation: int | None
    details: dict[str, Any]

    @property
    def duration(self) -> float:
        return self.end - self.begin


class Step(NamedTuple):
    """One marked step: its number, and when the host began and ended it."""

    number: int
    begin: float
    end: float


class HostThread:
    """One thread's events, which are nested: each begins and ends within the one around it."""

    def __init__(self, events: list[HostEvent]) -> None:
        self.events = sorted(events, key=lambda event: (event.begin, -event.end))
        self._begins = [event.begin for event in self.events]
        self._parents: list[int] = []
        open_: list[int] = []
        for index, event in enumerate(self.events):
            # The host's two clocks agree to a microsecond: a call may seem to outlast the operator that made it by that much.
            while open_ and ((outer := self.events[open_[-1]]).end <= event.begin or outer.end < event.end - 1.0):
                open_.pop()
            self._parents.append(open_[-1] if open_ else -1)
            open_.append(index)

    def around(self, time: float) -> Iterator[HostEvent]:
        """The events that are under way at a time, the innermost first."""
        index = bisect.bisect_right(self._begins, time) - 1
        while index >= 0:
            if self.events[index].end >= time:
                yield self.events[index]
            index = self._parents[index]

    def during(self, begin: float, end: float) -> list[HostEvent]:
        """The events that overlap a range, outer ones before inner ones."""
        outer = [event for event in self.around(begin) if event.end > begin]
        inner = self.events[bisect.bisect_right(self._begins, begin) : bisect.bisect_left(self._begins, end)]
        return [*reversed(outer), *inner]

    def own_time(self, begin: float, end: float) -> dict[HostEvent, float]:
        """How long each event was the innermost one within the range; Python functions do not count."""
        own: dict[HostEvent, float] = {}
        open_: list[HostEvent] = []
        now = begin

        def advance(until: float) -> None:
            nonlocal now
            while open_ and open_[-1].end <= until:
                event = open_.pop()
                own[event] = own.get(event, 0.0) + max(0.0, event.end - now)
                now = max(now, event.end)
            if open_ and until > now:
                own[open_[-1]] = own.get(open_[-1], 0.0) + until - now
            now = max(now, until)

        for event in self.during(begin, end):
            if event.kind == "python":
                continue
            advance(max(begin, event.begin))
            open_.append(event)
        advance(end)
        return {event: time for event, time in own.items() if time > 0}


@dataclass(frozen=True)
class Trace:
    """One recording.

    Attributes:
        gpu: the GPU's activities, by begin.
        threads: the host's threads.
        launches: correlation number -> the host call that has it.
        steps: the marked steps, by begin; empty where none are marked.
        metadata: what the recorder of this project has added, empty in other traces.
        devices: names of the GPUs, by index, where the trace has them.
    """

    gpu: list[GpuActivity]
    threads: dict[Thread, HostThread]
    launches: dict[int, HostEvent]
    steps: list[Step] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)

    def launch(self, activity: GpuActivity) -> HostEvent | None:
        """The host call that launched an activity, None where the trace has none."""
        return None if activity.correlation is None else self.launches.get(activity.correlation)

    def host_events(self) -> Iterator[HostEvent]:
        for thread in self.threads.values():
            yield from thread.events


def load(path: Path) -> dict[str, Any]:
    """The JSON object of a trace file, plain or compressed by gzip.

    Raises:
        ValueError: the file cannot be read or is no trace.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"trace={str(path)!r}: cannot be read: {error.strerror or error}") from None
    except (EOFError, ValueError) as error:
        raise ValueError(f"trace={str(path)!r}: is not JSON: {error}") from None
    if isinstance(content, list):  # the other form of the Chrome format: the events alone
        content = {"traceEvents": content}
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ValueError(
            f"trace={str(path)!r}: has no traceEvents: must be a Chrome trace, as torch.profiler's export_chrome_trace writes it"
        )
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """The trace as a file that Perfetto and chrome://tracing open, compressed where the name ends in .gz.

    Raises:
        ValueError: it cannot be written.
    """
    data = json.dumps(content, separators=(",", ":")).encode()
    _write(path, gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def write_text(path: Path, text: str) -> None:
    """A file, its folder made where needed.

    Raises:
        ValueError: it cannot be written.
    """
    _write(path, text.encode())


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}") from None


def parse(content: dict[str, Any]) -> Trace:
    """The trace in a JSON object with ``traceEvents``."""
    events = read_events(content)
    base = first_time(events)
    gpu: list[GpuActivity] = []
    host: dict[Thread, list[HostEvent]] = {}
    for event in events:
        kind = str(event["cat"]).lower()
        if kind in GPU_KINDS:
            gpu.append(_gpu_activity(event, GPU_KINDS[kind], base))
        else:
            one = _host_event(event, HOST_KINDS[kind], base)
            host.setdefault(one.thread, []).append(one)
    launches = {one.correlation: one for own in host.values() for one in own if one.kind == "runtime" and one.correlation is not None}
    steps = [
        Step(int(number[1]), one.begin, one.end)
        for own in host.values()
        for one in own
        if one.kind in ("annotation", "operator") and (number := _STEP.fullmatch(one.name))
    ]
    return Trace(
        sorted(gpu, key=lambda one: (one.begin, one.end)),
        {thread: HostThread(own) for thread, own in host.items()},
        launches,
        sorted(steps, key=lambda step: step.begin),
        content.get(METADATA) or {},
        [str(device.get("name", "")) for device in content.get("deviceProperties") or [] if isinstance(device, dict)],
    )


def read(path: Path) -> Trace:
    """`load` and `parse`.

    Raises:
        ValueError: see `load`.
    """
    content = load(path)
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"trace={str(path)!r}: has an event that cannot be read: {type(error).__name__} {error}") from None


def first_time(events: list[dict[str, Any]]) -> float:
    """The begin of the first event that is not a Python function: zero of a `Trace`'s times, also where those are left out."""
    return min((float(event["ts"]) for event in events if str(event["cat"]).lower() != "python_function"), default=0.0)


def read_events(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of the categories that are read."""
    kinds = GPU_KINDS.keys() | HOST_KINDS.keys()
    return [event for event in content["traceEvents"] if event.get("ph") == "X" and str(event.get("cat", "")).lower() in kinds]


def _span(event: dict[str, Any], base: float) -> tuple[float, float]:
    begin = float(event["ts"]) - base
    return begin, begin + float(event.get("dur", 0.0))


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) or (isinstance(value, str) and value.lstrip("-").isdigit()) else None


def _gpu_activity(event: dict[str, Any], kind: str, base: float) -> GpuActivity:
    details = event.get("args") or {}
    device = _number(details.get("device", details.get("inDevice")))
    stream = _number(details.get("stream", str(event.get("tid", "")).removeprefix("stream ")))
    return GpuActivity(
        kind,
        str(event["name"]),
        *_span(event, base),
        device=(_number(event.get("pid")) or 0) if device is None else device,
        stream=0 if stream is None else stream,
        correlation=_number(details.get("correlation")),
        bytes=_number(details.get("bytes")),
    )


def _host_event(event: dict[str, Any], kind: str, base: float) -> HostEvent:
    details = event.get("args") or {}
    begin, end = _span(event, base)
    thread = Thread(event["pid"], event["tid"])
    return HostEvent(kind, str(event["name"]), begin, end, thread, _number(details.get("correlation")), details)
