"""How long launches take, for tests and measurements: in a replayed CUDA graph, eager, and on the host. All in microseconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def captured(calls: Sequence[Callable[[], Any]]) -> tuple[Any, Any]:
    """A CUDA graph of all calls in turn, and what the last of them returned: memory that each replay writes anew.

    Each call runs once before, which loads its kernels.
    """
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, result = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for call in calls:
            result = call()
    return graph, result


def graph_us(calls: Sequence[Callable[[], Any]], *, rounds: int = 25, skipped: int = 5) -> float:
    """Median time of one call on the GPU alone: all of them in one graph, replayed; the first rounds are left out."""
    import torch

    graph, _ = captured(calls)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[skipped:])


def eager_us(call: Callable[[], Any], *, repeats: int = 50) -> float:
    """Median time of a call that follows calls like it, the GPU's work included."""
    return _median_us(call, repeats, waits=True)


def host_us(call: Callable[[], Any], *, repeats: int = 20) -> float:
    """Median time until a call returns, whenever the GPU does its work."""
    return _median_us(call, repeats, waits=False)


def _median_us(call: Callable[[], Any], repeats: int, *, waits: bool) -> float:
    import torch

    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if waits:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / repeats)
    return statistics.median(times[2:])
