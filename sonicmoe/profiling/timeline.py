"""A piece of a trace drawn as lanes of bars in HTML: one lane for each stream, for the idle GPU, and for what the host's threads do.

Positions are percentages of the piece, so that it fits any width; what is narrower than a pixel or so is drawn together.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from sonicmoe.profiling.intervals import Interval, clip, union
from sonicmoe.profiling.kernels import caller_name, short_name
from sonicmoe.profiling.memory import LINE
from sonicmoe.profiling.trace import GpuActivity, HostEvent, HostThread, Trace
from sonicmoe.profiling.work import PREFIX

STYLE = """
.time { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .4rem .6rem .5rem; }
.time > div { min-width: 54rem; }
.lane { display: flex; align-items: center; margin: 2px 0; }
.lane > b { flex: 0 0 7.2rem; font-weight: 600; font-size: .74rem; line-height: 1.2; color: var(--soft); }
.lane > b { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.lane > b { position: sticky; left: 0; background: var(--card); z-index: 1; }
.bars { position: relative; flex: 1; height: 1.5rem; background: #f2f4f8; border-radius: 2px; overflow: hidden; }
.bars i { position: absolute; top: 0; bottom: 0; min-width: 1px; font-style: normal; font-size: .68rem; line-height: 1.5rem; color: #fff; }
.bars i { overflow: hidden; white-space: nowrap; padding-left: 2px; border-right: 1px solid rgba(255,255,255,.55); }
.bars i.thin { padding: 0; border: 0; }
.idle .bars, .axis .bars { height: .9rem; }
.axis .bars { background: none; } .axis i { color: var(--soft); border: 0; border-left: 1px solid var(--line); line-height: .9rem; }
.keys { display: flex; flex-wrap: wrap; gap: .25rem .8rem; font-size: .78rem; margin: .4rem 0; }
.keys i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .3rem; vertical-align: -1px; }
@media (max-width: 760px) { .lane > b { flex-basis: 5.8rem; font-size: .68rem; } .time > div { min-width: 46rem; } }
"""

_PALETTE = ("#2864c7", "#1a7f4b", "#8a4fbf", "#b35c00", "#0d7d86", "#a83267", "#5b6b1f", "#6b4a2f")
_COPY, _OTHER, _IDLE, _HOST, _WAIT = "#c2410c", "#7b8794", "#b3261e", "#56749c", "#8d9bb0"
_NARROW = 0.0015
"""Share of the width below which neighbours are drawn together."""
_LABEL = 0.035
"""Share of the width from which a bar has its name in it."""


@dataclass(frozen=True)
class Bar:
    """One bar: microseconds, the name within it, and what is shown where one points at it."""

    begin: float
    end: float
    label: str
    color: str
    title: str

    @property
    def duration(self) -> float:
        return self.end - self.begin


class Colors:
    """The same colour for the same operation in all of a page's timelines: the eight with most time have their own."""

    def __init__(self, trace: Trace, window: Interval) -> None:
        time: dict[str, float] = {}
        for one in trace.gpu:
            if one.kind == "kernel" and window[0] <= one.begin < window[1]:
                name = caller_name(trace, one) or short_name(one.name)
                time[name] = time.get(name, 0.0) + one.duration
        names = sorted(time, key=lambda name: -time[name])[: len(_PALETTE)]
        self.own = dict(zip(names, _PALETTE, strict=False))

    def of(self, trace: Trace, one: GpuActivity) -> tuple[str, str]:
        """(label, colour)."""
        if one.kind != "kernel":
            return one.name.split(" (")[0], _COPY
        name = caller_name(trace, one) or short_name(one.name)
        return name, self.own.get(name, _OTHER)

    def legend(self) -> str:
        keys = [*self.own.items(), ("other kernels", _OTHER), ("copies and memsets", _COPY), ("GPU idle", _IDLE)]
        body = "".join(f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in keys)
        return f'<div class="keys">{body}</div>'


def draw(trace: Trace, window: Interval, colors: Colors, *, least_idle_us: float) -> str:
    """The lanes within the window, which is not empty."""
    lanes = []
    streams: dict[tuple[int, int], list[GpuActivity]] = {}
    for one in trace.gpu:
        if one.end > window[0] and one.begin < window[1]:
            streams.setdefault((one.device, one.stream), []).append(one)
    devices = len({device for device, _ in streams})
    for device, stream in sorted(streams):
        bars = [_gpu_bar(trace, one, colors) for one in streams[device, stream]]
        lanes.append(_lane(f"GPU {device}, stream {stream}" if devices > 1 else f"stream {stream}", bars, window))
    if trace.gpu:
        lanes.append(_lane("GPU idle", _idle_bars(trace, window, least_idle_us), window, css="idle"))
    for number, thread in enumerate(_launching(trace, window)):
        events = thread.during(*window)
        layer = [_host_bar(event, _HOST) for event in events if event.kind == "annotation" and event.name.startswith(PREFIX)]
        calls = [_host_bar(event, _WAIT) for event in events if event.kind == "runtime"]
        for what, bars in (("ops", _outermost(events)), ("layer", layer), ("CUDA", calls)):
            if bars:
                lanes.append(_lane(f"host {number + 1}: {what}", bars, window))
    return f'<div class="time"><div>{_axis(window)}{"".join(lanes)}</div></div>'


def _gpu_bar(trace: Trace, one: GpuActivity, colors: Colors) -> Bar:
    label, color = colors.of(trace, one)
    name = short_name(one.name) if one.kind == "kernel" else one.name
    size = f", {one.bytes / 1e6:.3f} MB" if one.bytes else ""
    return Bar(one.begin, one.end, label, color, f"{name}: {one.duration:.1f} us{size}")


def _idle_bars(trace: Trace, window: Interval, least_us: float) -> list[Bar]:
    busy = [(window[0], window[0]), *clip(union((one.begin, one.end) for one in trace.gpu), window), (window[1], window[1])]
    gaps = [(before[1], after[0]) for before, after in itertools.pairwise(busy)]
    return [Bar(begin, end, "", _IDLE, f"idle for {end - begin:.1f} us") for begin, end in gaps if end - begin >= least_us]


def _launching(trace: Trace, window: Interval) -> list[HostThread]:
    """Threads with operators or calls in the window, those with most first; four at most."""
    found = [(sum(event.kind != "python" for event in thread.during(*window)), thread) for thread in trace.threads.values()]
    return [thread for count, thread in sorted(found, key=lambda pair: -pair[0])[:4] if count]


def _outermost(events: list[HostEvent]) -> list[Bar]:
    """The operators and ranges that lie in no other; the marks of steps and lines are not among them."""
    bars: list[Bar] = []
    for event in events:
        marks = event.name.startswith(("ProfilerStep#", LINE))
        if event.kind in ("operator", "annotation") and not marks and (not bars or event.begin >= bars[-1].end):
            bars.append(_host_bar(event, _HOST))
    return bars


def _host_bar(event: HostEvent, color: str) -> Bar:
    name = event.name.split(" flops=")[0]
    return Bar(event.begin, event.end, name, color, f"{name}: {event.duration:.1f} us")


def _lane(name: str, bars: Iterable[Bar], window: Interval, *, css: str = "") -> str:
    low, high = window
    scale = 100 / (high - low)
    body = []
    for bar in _merged(bars, window):
        begin, end = max(bar.begin, low), min(bar.end, high)
        share = (end - begin) / (high - low)
        place = f"left:{(begin - low) * scale:.3f}%;width:{(end - begin) * scale:.3f}%;background:{bar.color}"
        text, thin = (escape(bar.label), "") if share >= _LABEL else ("", ' class="thin"')
        body.append(f'<i{thin} style="{place}" title="{escape(bar.title)}">{text}</i>')
    return f'<div class="lane {css}"><b title="{escape(name)}">{escape(name)}</b><div class="bars">{"".join(body)}</div></div>'


def _merged(bars: Iterable[Bar], window: Interval) -> list[Bar]:
    """In order; bars that are too narrow to be seen are joined with a neighbour of their colour that is as near."""
    narrow = (window[1] - window[0]) * _NARROW
    joined: list[Bar] = []
    for bar in sorted(bars, key=lambda each: each.begin):
        last = joined[-1] if joined else None
        if last and last.color == bar.color and bar.begin - last.end < narrow / 3 and min(bar.duration, last.duration) < narrow:
            longer = max(last, bar, key=lambda each: each.duration)
            joined[-1] = Bar(last.begin, max(last.end, bar.end), longer.label, bar.color, f"{longer.title}, and shorter ones")
        else:
            joined.append(bar)
    return joined


def _axis(window: Interval) -> str:
    """Ticks at round times since the window's begin."""
    span = window[1] - window[0]
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 9)
    unit, name = (1e3, "ms") if span >= 2e3 else (1.0, "us")
    ticks = "".join(
        f'<i style="left:{100 * tick * step / span:.3f}%;width:{100 * step / span:.3f}%">{tick * step / unit:g} {name}</i>'
        for tick in range(int(span / step) + 1)
    )
    return f'<div class="lane axis"><b></b><div class="bars">{ticks}</div></div>'
