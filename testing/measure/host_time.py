"""Host time of a layer at a size at which the GPU keeps up: how long a call takes to return, with the GPU idle before each batch of calls.

Inference, training's forward, its backward and a whole step; the same with every operation called by itself; and the parts that an
inference's time is made of, so that one run says where the rest goes:

    module       the call through torch.nn.Module, less the layer's own forward
    allocations  of scratch and output
    launches     the one call that issues all six launches, or seven
    launch       one bare launch from Python, of gather_sum: what is beside it is the kernels' and the driver's
    conditions   what is left of inference: whether this is the usual case, and the look-up of its launches
"""

from collections.abc import Callable
from typing import Any

import torch

from dispatch import gather_sum_hopper
from sonicmoe import backends
from sonicmoe.moe import MoE
from sonicmoe.thiek import Thiek
from sonicmoe.timing import Timing
from testing.measure.clock import Function, until_return
from testing.measure.items import Bound, Options, cell

HOST_US = 60.0
REPEATS = 20
"""Calls of a batch."""
JUDGED = ("inference", "forward")


def measured(options: Options, name: str, thiek: Thiek) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        case, layer = options.problem(thiek)
        times = _inference(options, layer, case.x) | _training(options, layer, case.x.requires_grad_(), case.dout)
        about = {"mode": "host time", "thiek": thiek, "routing": "top_k"}
        return [
            cell(
                options,
                f"{name}/{mode}",
                bound=Bound(time.ms * 1e3, "microseconds of host time", HOST_US) if mode in JUDGED else None,
                **about,
                ms=time.ms,
                ms_spread=time.ms_spread,
            )
            for mode, time in times.items()
        ]

    return run


def _one_by_one(function: Function) -> Function:
    def call() -> None:
        with backends.one_by_one():
            function()

    return call


@torch.no_grad()
def _inference(options: Options, layer: MoE, x: torch.Tensor) -> dict[str, Timing]:
    whole = {
        "inference": lambda: layer(x),
        "inference, one by one": _one_by_one(lambda: layer(x)),
        "forward alone": lambda: layer.forward(x),
    }
    timed = parts(layer, x)  # none where the layer does not run on the kernels
    for function in (*whole.values(), *timed.values()):
        function()  # loads the kernels
    times = until_return({**whole, **timed}, options, repeats=REPEATS)
    alone, inference = times.pop("forward alone"), times["inference"]
    rest = alone.ms - sum(times[part].ms for part in ("allocations", "launches") if part in times)
    left = {"module": inference.ms - alone.ms} | ({"conditions": rest} if "launches" in times else {})
    times |= {part: Timing(ms, inference.ms_spread, inference.repeats) for part, ms in left.items()}
    return {f"part/{mode}" if mode in (*timed, *left) else mode: time for mode, time in times.items()}


def parts(layer: MoE, x: torch.Tensor) -> dict[str, Function]:
    """What an inference calls, by itself; nothing on other devices than the kernels'."""
    weight, w_up, w_down = layer.router.weight, layer.w_up, layer.w_down
    settings = (layer.backend, layer.router_config.choice, layer.activation, layer.gate_up_layout)
    forward = backends.load("hopper_layer").forward(x.shape, w_up.shape, x.dtype, x.device, *settings, False, False, False, False)
    if forward is None:
        return {}
    scratch, out = x.new_empty(forward.scratch), torch.empty_like(x)
    k = layer.num_experts_per_tok
    rows = x.shape[0] * k
    y, score, slot_to_row = x.new_zeros(rows, x.shape[1]), x.new_zeros(rows, dtype=torch.float32), x.new_zeros(rows, dtype=torch.int32)
    gather_sum = gather_sum_hopper.kernel(x.dtype, True, torch.float32)

    def allocate() -> None:
        x.new_empty(forward.scratch)
        torch.empty_like(x)

    def launch() -> None:
        if forward.launch(x, weight, w_up, w_down, None, None, None, scratch, None, None, out) is not None:
            raise RuntimeError("the layer's tensors are not as its launches take them")

    return {"allocations": allocate, "launches": launch, "launch": lambda: gather_sum(y, score, slot_to_row, None, None, out, k, 0)}


def _training(options: Options, layer: MoE, x: torch.Tensor, dout: torch.Tensor) -> dict[str, Timing]:
    leaves = [x, *layer.parameters()]
    outs: list[torch.Tensor] = []

    def prepare() -> None:
        outs[:] = [layer(x) for _ in range(REPEATS)]

    def backward() -> None:
        torch.autograd.grad(outs.pop(), leaves, dout)

    def step() -> None:
        torch.autograd.grad(layer(x), leaves, dout)

    steps = {"training step": step, "training step, one by one": _one_by_one(step)}
    for function in steps.values():
        function()
    # By itself, like inference: behind a step's batch, whose backward runs in a thread of its own, the same calls took up to twice as long.
    times = until_return({"forward": lambda: layer(x)}, options, repeats=REPEATS) | until_return(steps, options, repeats=REPEATS)
    return times | until_return({"backward": backward}, options, repeats=REPEATS, prepare=prepare)
