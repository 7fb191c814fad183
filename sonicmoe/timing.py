"""How long something takes, and what a layer's arithmetic would take at best.

Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
"""

import collections
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:  # a peer's process loads this file by its path, and must not import this package
    from sonicmoe.thiek import Thiek


class Timing(NamedTuple):
    """Times of one variant in milliseconds."""

    ms: float
    """Median."""
    ms_spread: float
    """Distance between the quartiles."""
    repeats: int


@dataclass(frozen=True)
class Variant:
    """What to time: ``run(prepare())``, where only ``run`` is on the clock."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def measure(
    variants: Mapping[str, Variant],
    *,
    device: torch.device | str,
    warmup_s: float = 0.2,
    measure_s: float = 0.5,
    min_repeats: int = 5,
    max_repeats: int = 200,
) -> dict[str, Timing]:
    """Time all variants in turn, round after round, so that a drifting clock or neighbour meets all of them alike.

    On a GPU each run lies between two CUDA events, and the host issues the next round while one runs, as in training or a busy
    server: what a variant costs the host shows as far as the GPU waits for it. How long a lone call takes is another question.

    Args:
        device: where they run. CUDA events on a GPU, `time.perf_counter` elsewhere.
        warmup_s: rounds are run untimed until this much time has passed, at least one.
        measure_s: rounds are run until this much time was measured per variant, within the two bounds on repeats.
    """
    device = torch.device(device)
    issue, ahead = (_issue_cuda, 1) if device.type == "cuda" else (_issue_host, 0)
    issued: collections.deque[dict[str, Callable[[], float]]] = collections.deque()

    def begin_round() -> None:
        issued.append({name: issue(variant, device) for name, variant in variants.items()})

    def next_round() -> dict[str, float]:
        begin_round()
        return {name: read() for name, read in issued.popleft().items()}

    for _ in range(ahead):
        begin_round()
    begin, warm = time.perf_counter(), False
    while not warm or time.perf_counter() - begin < warmup_s * len(variants):
        next_round()
        warm = True
    samples: dict[str, list[float]] = {name: [] for name in variants}
    rounds, total = 0, 0.0
    while rounds < max_repeats and (rounds < min_repeats or total < measure_s * 1e3 * len(variants)):
        for name, ms in next_round().items():
            samples[name].append(ms)
            total += ms
        rounds += 1
    return {name: Timing(*_quartiles(values), len(values)) for name, values in samples.items()}


def combine(trials: list[Timing]) -> Timing:
    """One Timing of several trials: the median of their medians and the distance between these medians' quartiles."""
    if len(trials) == 1:
        return trials[0]
    return Timing(*_quartiles([trial.ms for trial in trials]), sum(trial.repeats for trial in trials))


def _quartiles(samples: list[float]) -> tuple[float, float]:
    """(median, distance between the quartiles)."""
    if len(samples) == 1:
        return samples[0], 0.0
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return median, third - first


def _issue_cuda(variant: Variant, device: torch.device) -> Callable[[], float]:
    """Runs the variant; waits for its milliseconds when asked for them."""
    with torch.cuda.device(device):
        argument = variant.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        variant.run(argument)
        end.record()

    def read() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return read


def _issue_host(variant: Variant, device: torch.device) -> Callable[[], float]:
    argument = variant.prepare()
    begin = time.perf_counter()
    variant.run(argument)
    ms = (time.perf_counter() - begin) * 1e3
    return lambda: ms


def model_flops(rows: float, hidden_size: int, intermediate_size: int, *, gated: bool) -> dict[str, float]:
    """FLOPs of the experts' products by mode: 6 R H I forward, 12 backward with a gate; 4 and 8 without."""
    forward = 2.0 * rows * hidden_size * intermediate_size * (3 if gated else 2)
    return {"inference": forward, "forward": forward, "backward": 2 * forward, "forward+backward": 3 * forward}


def tflops(flops: float, ms: float) -> float:
    """10^12 floating-point operations a second."""
    return flops / (ms * 1e9) if ms > 0 else math.nan


def bound_rows(thiek: "Thiek") -> int:
    """Rows of each expert in the GEMM bound, T*K/E rounded up, at least 1."""
    return max(1, -(-thiek.rows // thiek.E))


def gemm_bound_variants(thiek: "Thiek", *, dtype: torch.dtype, device: torch.device | str, gated: bool = True) -> dict[str, Variant]:
    """The yardstick: the layer's products alone, as batched products with equal experts, on normally distributed data.

    Returns:
        "bound forward": the two products of a forward pass; "bound backward": the four of a backward pass; and
        "bound forward+backward": all six. To be timed by `measure` next to the layer.
    """
    E, M, H, I, Z = thiek.E, bound_rows(thiek), thiek.H, thiek.I, thiek.I * (2 if gated else 1)
    make = {"dtype": dtype, "device": device}
    x, dy, a, z = (torch.randn(E, M, width, **make) for width in (H, H, I, Z))
    w_up = torch.randn(E, Z, H, **make) / math.sqrt(H)
    w_down = torch.randn(E, H, I, **make) / math.sqrt(I)

    def forward(_: object) -> None:
        torch.bmm(x, w_up.mT)
        torch.bmm(a, w_down.mT)

    def backward(_: object) -> None:
        torch.bmm(dy, w_down)
        torch.bmm(dy.mT, a)
        torch.bmm(z, w_up)
        torch.bmm(z.mT, x)

    def both(_: object) -> None:
        forward(_)
        backward(_)

    return {"bound forward": Variant(forward), "bound backward": Variant(backward), "bound forward+backward": Variant(both)}
