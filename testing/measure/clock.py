"""Times of calls, taken in turns: eager, in a replayed CUDA graph, or until the call returns. Milliseconds of one call."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from cute_runtime.timing import captured
from sonicmoe import timing
from sonicmoe.timing import Timing, Variant
from testing.measure.items import Options

Function = Callable[[], object]


class Call(NamedTuple):
    """A function to time."""

    function: Function
    repeats: int = 20
    """Calls in a row between two readings of the clock."""
    in_graph: bool = False
    """Whether these calls are one CUDA graph, which shows the GPU's time and not the host's."""


def per_call(calls: Mapping[str, Call], options: Options) -> dict[str, Timing]:
    """All calls in turn, round after round: on a GPU by events, the GPU's work included."""
    return _per_call(calls, {name: Variant(_batch(call)) for name, call in calls.items()}, options.device, options)


def until_return(
    functions: Mapping[str, Function], options: Options, *, repeats: int = 20, prepare: Callable[[], None] = lambda: None
) -> dict[str, Timing]:
    """Until a call returns, with the GPU idle before each batch: what the host does, provided that the GPU keeps up with a batch.

    ``prepare`` is called before each batch, off the clock.
    """
    calls = {name: Call(function, repeats) for name, function in functions.items()}

    def wait() -> None:
        prepare()
        if options.on_gpu:
            torch.cuda.synchronize(options.device)

    return _per_call(calls, {name: Variant(_batch(call), prepare=wait) for name, call in calls.items()}, torch.device("cpu"), options)


def effort(options: Options) -> dict[str, float]:
    """For `timing.measure`."""
    return {"warmup_s": 0.0, "measure_s": 0.0, "min_repeats": 2} if options.quick else {"warmup_s": 0.2, "measure_s": 0.3}


def _per_call(calls: Mapping[str, Call], variants: dict[str, Variant], clock: torch.device, options: Options) -> dict[str, Timing]:
    times = timing.measure(variants, device=clock, **effort(options))
    return {name: Timing(time.ms / calls[name].repeats, time.ms_spread / calls[name].repeats, time.repeats) for name, time in times.items()}


def _batch(call: Call) -> Callable[[object], None]:
    if call.in_graph:
        graph, _ = captured([call.function] * call.repeats)
        return lambda _: graph.replay()

    def run(_: object) -> None:
        for _ in range(call.repeats):
            call.function()

    return run
