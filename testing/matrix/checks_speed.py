"""A speed cell: one mode of one layer and the GEMM bound, timed in turn in the same process on the same GPU.

T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from sonicmoe import memory, routed_experts, router, timing
from testing.matrix.cells import SpeedCell
from testing.matrix.checks_layer import DTYPES
from testing.matrix.describe import cell_seed
from testing.matrix.operation_times import operation_times
from testing.matrix.route import route
from testing.matrix.speed import DRAWS, Round, Rule, Trial, needs_more_rounds, summarize

BOUND = {"inference": "bound forward", "forward": "bound forward", "forward+backward": "bound forward+backward"}
OPERATION_RUNS = 5
"""Runs of a trial in which the operations are timed one by one; their medians count."""


def measure_speed(cell: SpeedCell, seed: int, rule: Rule, device: str = "cuda") -> dict[str, Any]:
    """The layer's time, router included, its operations' and the bound's, over rounds of the cell's own draws of tokens and router.

    `seed` draws the weights and dout, whose values make no work. Tokens and router, which decide how many rows each expert has, come from
    the cell's name and the draw's number alone: other runs time the same routings.
    """
    T, H, I, E, K = cell.thiek
    dtype, trains = DTYPES[cell.dtype], cell.mode != "inference"

    def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale).requires_grad_(trains)

    own = torch.Generator(device=device).manual_seed(seed)
    weights = [normal(own, E, 2 * I, H, scale=H**-0.5), normal(own, E, H, I, scale=I**-0.5)]
    dout = normal(own, T, H).detach()

    def forward(x: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
        logits = router.router_logits(x, router_weight)
        return routed_experts(x, *weights, route(logits, K, cell.routing, None, draw_seed(cell, 0), origin=(x, router_weight)))

    def tokens_of(draw: int) -> list[torch.Tensor]:
        # Made anew each time: all draws of the largest cell would take 1.3 GB.
        generator = torch.Generator(device=device).manual_seed(draw_seed(cell, draw))
        return [normal(generator, T, H), normal(generator, E, H, scale=H**-0.5)]

    def run(tokens: list[torch.Tensor]) -> None:
        o = forward(*tokens)
        if cell.mode == "forward+backward":
            torch.autograd.grad(o, [*tokens, *weights], dout)

    used = _memory(forward, run, tokens_of(0), weights, trains=trains, device=device)
    bound_name = BOUND[cell.mode]
    bound = timing.gemm_bound_variants(cell.thiek, dtype=dtype, device=device)[bound_name]

    def trial(draw: int, warmup_s: float) -> Trial:
        layer = functools.partial(run, tokens_of(draw))
        with torch.set_grad_enabled(trains):
            variants = {"layer": timing.Variant(lambda _: layer()), bound_name: bound}
            times = timing.measure(variants, device=device, warmup_s=warmup_s, measure_s=0.1)
            return Trial(times["layer"].ms, times[bound_name].ms, _time_operations(layer, device))

    rounds: list[Round] = []
    while needs_more_rounds(rounds, rule):
        # The first trial warms the clock up; the others only their own tokens.
        rounds.append([trial(draw, 0.02 if rounds or draw else 0.3) for draw in range(DRAWS)])
    summary = summarize(rounds)
    flops = timing.model_flops(cell.thiek.rows, H, I, gated=True)[cell.mode]
    return {**summary, **used, "tflops": timing.tflops(flops, summary["ms"])}


def draw_seed(cell: SpeedCell, draw: int) -> int:
    """The seed of a cell's tokens and router, the same in every run; the first draw's is that of stochastic rounding too."""
    return cell_seed(draw, f"{cell.name} draw")


def _memory(
    forward: Callable[..., torch.Tensor],
    run: Callable[[list[torch.Tensor]], None],
    tokens: list[torch.Tensor],
    weights: list[torch.Tensor],
    *,
    trains: bool,
    device: str,
) -> dict[str, float]:
    """What the mode keeps for backward beyond inputs and parameters, and on a GPU its peak, all tensors included."""
    used = {"saved_mib": memory.saved_mib(lambda: forward(*tokens), [*tokens, *weights])} if trains else {}
    with torch.set_grad_enabled(trains):
        peak = memory.peak_mib(lambda: run(tokens), torch.device(device))
    return used if peak is None else {**used, "peak_mib": round(peak)}


def _time_operations(layer: Callable[[], None], device: str) -> dict[str, float]:
    runs = []
    for _ in range(OPERATION_RUNS):
        with operation_times(device) as times:
            layer()
        runs.append(times.milliseconds())
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
