"""How long each operation of a layer takes within a run of the whole layer.

The operations are the functions of the backend that runs, and gather_sum. On a GPU events are recorded around each call on the
current stream, and read when the run is over, so that nothing waits in between.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from sonicmoe import operations


class OperationTimes:
    """Milliseconds of each operation, added up over its calls; read them after the run has ended."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self.calls: list[tuple[str, object, object]] = []

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            begin = self._now()
            result = function(*arguments, **options)
            self.calls.append((name, begin, self._now()))
            return result

        return call

    def _now(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, begin, end in self.calls:
            total[name] = total.get(name, 0.0) + (begin.elapsed_time(end) if self.on_gpu else 1e3 * (end - begin))
        return total


@contextlib.contextmanager
def operation_times(device: str) -> Iterator[OperationTimes]:
    """Time every operation of the layers that run inside."""
    times = OperationTimes(device)
    backend_names = ("reference", "hopper") if times.on_gpu else ("reference",)
    with operations.wrapped(times.timed, backend_names=backend_names):
        yield times
