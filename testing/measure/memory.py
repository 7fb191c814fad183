"""Suite ``memory``: what is saved for backward, and the peak of a training step.

Saved, beyond inputs and parameters: by the layer, router included, at most what the best open implementation saves (in whole MiB); by
the experts alone z (R, 2I) and O(R). On a GPU it is what the allocator holds after the forward more than before, without the output;
elsewhere the storages that autograd keeps. Saved by the experts, inputs are x, the weights and the routing.

The peak is that of a whole step, forward and backward with all gradients, above what parameters, input and the output's gradient
occupy before it. Both are measured after a first step, whose cuBLAS workspaces PyTorch keeps for the thread and stream: they are in
what is occupied before. docs/kernels/layer.md adds up what there must be.

T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from sonicmoe import memory, routed_experts
from sonicmoe.cases import Case
from sonicmoe.thiek import Thiek
from testing.measure.items import NEEDS_GPU, Bound, Item, Options, cell, size_text

SAVED_MIB = {
    Thiek(32768, 4096, 1024, 128, 8): 1029,
    Thiek(4096, 4096, 1024, 128, 8): 129,
    Thiek(4096, 4096, 1024, 256, 8): 129,
    Thiek(24576, 1536, 256, 128, 8): 196,
    Thiek(32768, 4096, 256, 256, 16): 522,
}
PEAK_MIB = {Thiek(24576, 1536, 256, 128, 8): 1205, Thiek(32768, 4096, 256, 256, 16): 6668}

BYTES_PER_ROW, BYTES_PER_EXPERT, BYTES_OF_THE_REST = 8, 4, 64
"""What the experts may save beside z: for each row both directions of the plan, for each expert where its rows begin, and counters."""
ROUNDED_UP_BYTES = 8 * 1024
"""What the GPU's allocator may add, up to 512 bytes a tensor."""


def items(options: Options) -> list[Item]:
    found = []
    saved, peaks = ({options.thiek(): None},) * 2 if options.quick else (SAVED_MIB, PEAK_MIB)
    for thiek, limit in saved.items():
        layer, experts = f"memory/saved-by-layer/{size_text(thiek)}", f"memory/saved-by-experts/{size_text(thiek)}"
        found += [Item(layer, _saved_by_layer(options, layer, thiek, limit)), Item(experts, _saved_by_experts(options, experts, thiek))]
    for thiek, limit in peaks.items():
        name = f"memory/peak/{size_text(thiek)}"
        found.append(Item(name, _peak(options, name, thiek, limit), "" if options.on_gpu else f"the allocator's peak {NEEDS_GPU}"))
    return found


def saved_mib(forward: Callable[[], torch.Tensor], own: list[torch.Tensor], device: torch.device) -> float:
    """MiB that a forward keeps for backward, its output not counted; ``own`` are its inputs and parameters."""
    if device.type != "cuda":
        return memory.saved_mib(forward, own)
    forward()  # loads kernels and workspaces, which stay
    _settle(device)
    before = torch.cuda.memory_allocated(device)
    out = forward()
    torch.cuda.synchronize(device)
    return (torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()) / 2**20


def _settle(device: torch.device) -> None:
    """Let go of what nobody holds any more."""
    gc.collect()
    torch.cuda.synchronize(device)


def _z_mib(case: Case) -> float:
    """z (R, 2I) in x's dtype."""
    return case.thiek.rows * case.w_up.shape[1] * case.x.dtype.itemsize / 2**20


def _saved_by_layer(options: Options, name: str, thiek: Thiek, limit: int | None) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        case, layer = options.problem(thiek)
        x = case.x.requires_grad_()
        saved = saved_mib(lambda: layer(x), [x, *layer.parameters(), *layer.buffers()], options.device)
        bound = None if limit is None else Bound(saved, "MiB saved for backward", limit, "at most")
        return [cell(options, name, mode="saved by the layer", bound=bound, thiek=thiek, saved_mib=saved, z_mib=_z_mib(case))]

    return run


def _saved_by_experts(options: Options, name: str, thiek: Thiek) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        case, layer = options.problem(thiek)
        with torch.no_grad():
            routing = case.router.route(layer.router(case.x))
        routing.score.requires_grad_()
        x, weights = case.x.requires_grad_(), [layer.w_up, layer.w_down]
        own = [x, *weights, routing.score, routing.token_index, routing.expert_index]
        saved = saved_mib(lambda: routed_experts(x, *weights, routing, backend=options.backend), own, options.device)
        metadata = BYTES_PER_ROW * thiek.rows + BYTES_PER_EXPERT * thiek.E + BYTES_OF_THE_REST
        allowed = _z_mib(case) + (metadata + (ROUNDED_UP_BYTES if options.on_gpu else 0)) / 2**20
        bound = Bound(saved, "MiB saved for backward, z and O(R)", allowed, "at most", everywhere=True)
        return [cell(options, name, mode="saved by the experts", bound=bound, thiek=thiek, saved_mib=saved, z_mib=_z_mib(case))]

    return run


def _peak(options: Options, name: str, thiek: Thiek, limit: int | None) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        case, layer = options.problem(thiek)
        x, device = case.x.requires_grad_(), options.device

        def step() -> None:
            layer(x).backward(case.dout)

        step()
        x.grad = None
        layer.zero_grad(set_to_none=True)
        _settle(device)
        before = torch.cuda.memory_allocated(device) / 2**20
        peak = memory.peak_mib(step, device) - before
        bound = None if limit is None else Bound(peak, "MiB at the peak of a step", limit, "at most")
        return [cell(options, name, mode="peak of a step", bound=bound, thiek=thiek, peak_mib=peak, before_mib=before)]

    return run
