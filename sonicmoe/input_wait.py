"""How long training steps wait for their input, by the way in which it comes to the device.

The steps of a group take one batch each, and the group's batches are as many GiB as is asked for. What is measured is the time
between the end of a step's work and the begin of the next one's, on the device's own clock: nothing but the input lies there.
Notation: T tokens, H hidden size.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from sonicmoe import benchmark, cases, timing
from sonicmoe.activations import is_gated
from sonicmoe.benchmark import Problem
from sonicmoe.data import PrefetchLoader

KINDS = ("resident", "pageable", "pinned", "prefetched")
"""resident: one batch that is on the device already, the control; pageable and pinned: ``batch.to(device, non_blocking=True)`` in the
step, from memory of that kind; prefetched: a `PrefetchLoader` over pageable batches."""


@dataclass(frozen=True)
class Group:
    """One group of steps, milliseconds."""

    ms: float
    waits: list[float]

    @property
    def step_ms(self) -> float:
        return self.ms / len(self.waits)

    @property
    def share(self) -> float:
        """Of the group's time in which the steps wait for input."""
        return sum(self.waits) / self.ms


def batches_of(problem: Problem, gib: float) -> int:
    """How many batches (T, H) make ``gib`` GiB; ValueError where that is less than one."""
    count = round(gib * 2**30 / batch_bytes(problem))
    if count < 1:
        raise ValueError(f"gib={gib}: must be at least one batch of T={problem.thiek.T}, {batch_bytes(problem) / 2**30:.3g} GiB")
    return count


def batch_bytes(problem: Problem) -> int:
    return problem.thiek.T * problem.thiek.H * cases.DTYPES[problem.dtype].itemsize


def check(problem: Problem, gib: float) -> None:
    """Raise ValueError where the layer or its input would not fit, before anything is allocated."""
    benchmark.check(problem, test=False)
    needed = int(2.25 * batches_of(problem, gib) * batch_bytes(problem))  # pageable, pinned, and staging buffers
    available = benchmark.available_memory(torch.device("cpu"))
    if needed > available:
        raise ValueError(
            f"gib={gib}: needs about {needed / 2**30:.1f} GiB of host memory, must be at most the {available / 2**30:.1f} free"
        )


def measure(problem: Problem, *, gib: float, rounds: int, on_round: Callable[[], None] = lambda: None) -> dict[str, list[Group]]:
    """``rounds`` groups of each kind, the kinds in turn, each group after one that is not counted.

    Args:
        gib: input of one group, GiB.
        on_round: called after each group that counts.
    """
    device, count = problem.device, batches_of(problem, gib)
    case = problem.make_case()
    layer = case.layer(problem.backend)
    parameters = list(layer.parameters())

    def step(batch: torch.Tensor) -> None:
        x = batch.detach().requires_grad_()
        torch.autograd.grad(layer(x), [x, *parameters], case.dout)

    generator = torch.Generator(device).manual_seed(problem.seed)
    shape = problem.thiek.T, problem.thiek.H
    make = {"generator": generator, "device": device, "dtype": case.x.dtype}
    pageable = [torch.randn(shape, **make).cpu() for _ in range(count)]
    pinned = [batch.pin_memory() for batch in pageable] if device.type == "cuda" else pageable
    found: dict[str, list[Group]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            batches = {"resident": [case.x] * count, "pinned": pinned}.get(kind, pageable)
            with closing(_arriving(kind, batches * 2, device)) as arriving:
                found[kind].append(_run(arriving, step, count, device))
            on_round()
    return found


def summarize(problem: Problem, found: dict[str, list[Group]], gib: float) -> list[dict[str, Any]]:
    """One cell of recorded results for each kind: medians over its groups, and what the kind costs next to resident input."""
    _, H, I, _, _ = problem.thiek
    flops = timing.model_flops(problem.thiek.rows, H, I, gated=is_gated(problem.activation))["forward+backward"]
    resident = statistics.median(group.step_ms for group in found["resident"])
    cells = []
    for kind, groups in found.items():
        times = timing.combine([timing.Timing(group.step_ms, 0.0, len(group.waits)) for group in groups])
        cells.append(
            {
                **problem.describe(),
                "name": f"input {kind}",
                "mode": "forward+backward",
                "input": kind,
                "input_gib": gib,
                "batch_mib": batch_bytes(problem) / 2**20,
                **times._asdict(),
                "tflops": timing.tflops(flops, times.ms),
                "input_wait_ms": statistics.median(sum(group.waits) / len(group.waits) for group in groups),
                "input_wait_share": statistics.median(group.share for group in groups),
                "slower_than_resident": times.ms / resident - 1,
            }
        )
    return cells


def _arriving(kind: str, batches: list[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """The batches on the device, one by one."""
    if kind != "prefetched":
        for batch in batches:
            yield batch.to(device, non_blocking=True)
        return
    with PrefetchLoader(batches, device) as loader:
        yield from loader


def _run(arriving: Iterator[torch.Tensor], step: Callable[[torch.Tensor], None], count: int, device: torch.device) -> Group:
    """Two groups of ``count`` steps; the second one counts, from the end of the first one's last step on."""
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    begins, ends = [], []
    for batch in arriving:
        begins.append(clock.now())
        step(batch)
        ends.append(clock.now())
    clock.finish()
    waits = [clock.ms(end, begin) for end, begin in zip(ends[count - 1 :], begins[count:], strict=False)]
    return Group(clock.ms(ends[count - 1], ends[-1]), waits)


class _CudaClock:
    """Times on the current stream: a time passes when all work before it is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


class _HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def finish(self) -> None:
        """The host's times have passed already."""

    def ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3
