"""Decoding, for suite ``tiles``: both projections of a forward at 1, 8 and 64 tokens of published layers, with each tile in turn.

A kernel of such a step takes less time than its launch, and a step's experts may lie in the L2 cache after the same step before. So what is
timed is a CUDA graph of ROTATED steps, which go to experts of their own with the same weights; times are of one step. The floor is
that of the weights of experts with rows. Layers have swiglu, concatenated and no bias, whatever the model has.
T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sonicmoe.kernels.tiles import Tile
from sonicmoe.thiek import Thiek
from testing.measure.clock import Call, per_call
from testing.measure.items import Bound, Item, Options, broken, cell, size_text
from testing.measure.kernels import KERNELS, LARGEST_ERROR, Data, Kernel, error_of, machine, using
from testing.transformers_layers import MODELS, ROTATED

NAMES = ("Mixtral-8x7B", "Qwen3-30B-A3B", "gpt-oss-20b")
SHAPES = tuple(Thiek(T, *(getattr(MODELS[name], size) for size in "HIEK")) for name in NAMES for T in (1, 8, 64))
PROJECTIONS = tuple(kernel for kernel in KERNELS if kernel.name in ("up (inference)", "down"))


def make_steps(thiek: Thiek, options: Options) -> list[Data]:
    """Steps with rows and routings of their own and one layer's weights."""
    first = Data(thiek, options)
    others = (Data(thiek, replace(options, seed=options.seed + i), weights=(first.w_up, first.w_down)) for i in range(1, ROTATED))
    return [first, *others]


def items_of_all_tiles(options: Options) -> list[Item]:
    """One a kernel and shape; none without the kernels."""
    if options.backend != "hopper":
        return []
    steps = functools.lru_cache(maxsize=1)(make_steps)  # the kernels of one shape follow each other
    found = []
    for thiek in dict.fromkeys(options.thiek(*shape) for shape in SHAPES):
        for kernel in PROJECTIONS:
            name = f"tiles/decode/{kernel.name.replace(' ', '-')}/{size_text(thiek)}"
            found.append(Item(name, functools.partial(measure, kernel, thiek, steps, kernel.tiles, options, name)))
    return found


def measure(
    kernel: Kernel, thiek: Thiek, steps: Callable[..., list[Data]], tiles: tuple[Tile, ...], options: Options, name: str
) -> list[dict[str, Any]]:
    """A cell for each tile; one that cannot be run is a failed cell with its reason, and the others still run."""
    own, (columns, reduced) = steps(thiek, options), kernel.products(thiek)
    experts = sum(int((data.plan.offsets.diff() > 0).sum()) for data in own) / len(own)
    flops_per_ms, bytes_per_ms = machine(options)
    floor_ms = max(2.0 * thiek.rows * columns * reduced / flops_per_ms, kernel.bytes(thiek._replace(E=experts)) / bytes_per_ms)
    cells, calls, errors = [], {}, {}
    for tile in tiles:
        way = f"{name}/{tile.name}"
        try:
            with using(kernel, tile):
                errors[way] = max(error_of(kernel, data, options.seed) for data in own)
        except Exception as error:
            cells.append(broken(way, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        calls[way] = Call(functools.partial(_run, kernel, tile, own), repeats=1, in_graph=options.on_gpu)
    times = per_call(calls, options)
    for way, error in errors.items():
        ms = times[way].ms / len(own)
        cells.append(
            cell(
                options,
                way,
                mode=kernel.name,
                bound=Bound(error, "relative error of the worst expert", LARGEST_ERROR, "at most", everywhere=True),
                thiek=thiek,
                routing="softmax",
                ms=ms,
                ms_spread=times[way].ms_spread / len(own),
                experts_with_rows=experts,
                floor_ms=floor_ms,
                floor_share=floor_ms / ms,
            )
        )
    return cells


def _run(kernel: Kernel, tile: Tile, steps: list[Data]) -> None:
    with using(kernel, tile):
        for data in steps:
            kernel.run(data)
