"""Unions of intervals. An interval is (begin, end) with begin <= end, in any unit."""

import bisect
from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; what touches is joined, empty intervals are dropped.

    Worked example: ``[(3, 5), (0, 2), (1, 3), (7, 7)]`` becomes ``[(0, 5)]``.
    """
    joined: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def clip(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """The parts inside the window."""
    low, high = window
    return [(max(begin, low), min(end, high)) for begin, end in intervals if end > low and begin < high]


def length(intervals: Iterable[Interval]) -> float:
    """The sum of the intervals' lengths."""
    return sum(end - begin for begin, end in intervals)


def uncovered(window: Interval, covering: list[Interval]) -> float:
    """How much of the window none of the intervals covers, which are disjoint and in order."""
    first = max(0, bisect.bisect_right(covering, window[0], key=lambda interval: interval[0]) - 1)
    last = bisect.bisect_left(covering, window[1], key=lambda interval: interval[0])
    return window[1] - window[0] - length(clip(covering[first:last], window))
