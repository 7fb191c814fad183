"""A speed cell: one mode of one layer and the GEMM bound, timed in turn in the same process on the same GPU.

T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

from typing import Any

import torch
import torch.nn.functional as F

from sonicmoe import routed_experts, timing
from testing.matrix.cells import SpeedCell
from testing.matrix.checks_layer import DTYPES
from testing.matrix.route import route

BOUND = {"inference": "bound forward", "forward": "bound forward", "forward+backward": "bound forward+backward"}


def measure_speed(cell: SpeedCell, seed: int, device: str = "cuda") -> dict[str, Any]:
    """Median and spread of the layer, router included, and its ratio to the bound: bound time / layer time."""
    T, H, I, E, K = cell.thiek
    dtype = DTYPES[cell.dtype]
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale

    leaves = [normal(T, H), normal(E, H, scale=H**-0.5), normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)]
    dout = normal(T, H)
    leaves = [leaf.requires_grad_(cell.mode != "inference") for leaf in leaves]

    def layer(_: object) -> None:
        x, router_weight, w_up, w_down = leaves
        o = routed_experts(x, w_up, w_down, route(F.linear(x, router_weight).float(), K, cell.routing, None, seed))
        if cell.mode == "forward+backward":
            torch.autograd.grad(o, leaves, dout)

    bound_name = BOUND[cell.mode]
    bound = timing.gemm_bound_variants(cell.thiek, dtype=dtype, device=device)[bound_name]
    with torch.set_grad_enabled(cell.mode != "inference"):
        times = timing.measure({"layer": timing.Variant(layer), bound_name: bound}, device=device)
    ours, theirs = times["layer"], times[bound_name]
    flops = timing.model_flops(cell.thiek.rows, H, I, gated=True)[cell.mode]
    return {
        "ms": ours.ms,
        "ms_spread": ours.ms_spread,
        "repeats": ours.repeats,
        "tflops": timing.tflops(flops, ours.ms),
        "bound_ms": theirs.ms,
        "bound_ms_spread": theirs.ms_spread,
        "ratio": theirs.ms / ours.ms,
    }
