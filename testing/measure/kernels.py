"""Suite ``kernels``: each kernel of the layer alone, beside the same product as torch.bmm and beside its own floor, with the tile of the
table; suite ``tiles`` with every tile in turn, from which the table follows.

A kernel's floor is max(FLOPs / matrix peak, bytes / copy bandwidth), both measured in the same run: the peak by a bfloat16 product of
8192 x 8192 x 8192, the bandwidth by a device copy of 1 GiB. Random top-K routing, normal data; all tiles of a kernel are timed in
turns with the product of equal experts. Each result is judged first, on experts drawn at random, against float32.

``python -m testing.measure.kernels DIR`` builds what the suite ``tiles`` needs, for a GPU machine without a compiler.
T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K rows.
"""

import argparse
import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import dispatch
from cute_runtime import Variant
from cute_runtime.builder import build_all
from routing import top_k
from sonicmoe import timing
from sonicmoe.activations import activate, activation_gradient
from sonicmoe.backends import hopper, hopper_backward, reference
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, SMALL, SQUARE, TALL, WIDE, Tile
from sonicmoe.thiek import Thiek
from testing.measure.clock import effort
from testing.measure.items import Bound, Item, Options, broken, cell, size_text

SHAPES = tuple(
    Thiek(*sizes)
    for sizes in (
        (32768, 4096, 1024, 128, 8),
        (4096, 4096, 1024, 128, 8),
        (4096, 4096, 1024, 256, 8),
        (24576, 1536, 256, 128, 8),
        (32768, 4096, 256, 256, 16),
    )
)
"""The five of the layer's speed cells."""

LAYOUT = {"activation": "swiglu", "gate_up_layout": "interleaved"}
BUILD = {"dtype": "bfloat16", "activation": "swiglu", "interleaved": True}
CHECKED_EXPERTS = 3
LARGEST_ERROR = 4e-3
"""Relative Frobenius error of one expert's result in bfloat16."""


class Data:
    """One shape's tensors, all of which a training step holds too; with ``weights`` (w_up, w_down) of another's."""

    def __init__(self, thiek: Thiek, options: Options, weights: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        T, H, I, E, K = self.thiek = thiek
        device = options.device
        self.operations = hopper if options.backend == "hopper" else reference
        generator = torch.Generator(device).manual_seed(options.seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

        routing = top_k(torch.randn(T, E, generator=generator, device=device), K)
        self.plan = dispatch.plan(routing.token_index, routing.expert_index, num_tokens=T, num_experts=E, slots_per_token=K)
        self.score = routing.score
        self.x, self.dout = normal(T, H), normal(T, H)
        self.w_up, self.w_down = weights or (normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5))
        self.z, self.dz, self.a = normal(T * K, 2 * I), normal(T * K, 2 * I), normal(T * K, I)
        self.y = normal(T * K, H)

    def rows(self, expert: int) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """An expert's rows, their tokens, and their scores (rows, 1)."""
        own = slice(*self.plan.offsets[expert : expert + 2].tolist())
        return own, self.plan.row_to_token[own].long(), self.score[self.plan.row_to_slot[own].long()].unsqueeze(1)


@dataclass(frozen=True)
class Kernel:
    """One kernel: how it is run, checked, and counted."""

    name: str
    run: Callable[[Data], Any]
    expected: Callable[[Data, int], dict[Any, torch.Tensor]]
    """Of one expert, in float32: what `pick` finds of the result."""
    pick: Callable[[Data, Any, int], dict[Any, torch.Tensor]]
    products: Callable[[Thiek], tuple[int, int]]
    """(columns, reduction) of a row's product: FLOPs = 2 R columns reduction."""
    bytes: Callable[[Thiek], int]
    tile_module: types.ModuleType | None = None
    tile_rule: str = ""
    """Where the host half finds the tile, so that another can be put in its place."""
    tiles: tuple[Tile, ...] = ()
    variant: Callable[[Tile], list[Variant]] = lambda tile: []
    """What must be built for a tile."""


def _weights(thiek: Thiek, columns: int, rows_moved: int) -> int:
    """Bytes in bfloat16: the weight or its gradient once, and what is read and written by row or token."""
    return 2 * (thiek.E * thiek.H * columns + rows_moved)


def _up_expected(data: Data, expert: int) -> dict:
    _, tokens, _ = data.rows(expert)
    z = data.x[tokens].float() @ data.w_up[expert].float().mT
    return {"a": activate(z, "swiglu", "interleaved"), "z": z}


def _backward_expected(data: Data, expert: int) -> dict:
    own, tokens, score = data.rows(expert)
    z, da = data.z[own].float(), data.dout[tokens].float() @ data.w_down[expert].float()
    return {"dz": activation_gradient(z, score * da, "swiglu", "interleaved"), "scaled_a": score * activate(z, "swiglu", "interleaved")}


def _sums_expected(data: Data, expert: int) -> dict:
    slots = data.rows(expert)[1].unsqueeze(1) * data.thiek.K + torch.arange(data.thiek.K, device=data.score.device)
    rows = data.y[data.plan.slot_to_row[slots].long()].float()
    return {"o": (data.score[slots].unsqueeze(2) * rows).sum(1)}


def _rows_of(*names: str) -> Callable[[Data, Any, int], dict]:
    """Picks an expert's rows of a result, or of several by name."""

    def pick(data: Data, result: Any, expert: int) -> dict:
        own, _, _ = data.rows(expert)
        results = result if isinstance(result, tuple) else (result,)
        return {name: tensor[own] for name, tensor in zip(names, results, strict=True) if name and tensor is not None}

    return pick


def _up(store_z: bool) -> Callable[[Data], Any]:
    return lambda data: data.operations.up_projection(data.x, data.w_up, None, data.plan, **LAYOUT, store_z=store_z)


def _up_variant(store_z: bool) -> Callable[[Tile], list[Variant]]:
    return lambda tile: [variants.up_projection(tile=tile, **BUILD, store_z=store_z, bias=False)]


KERNELS = (
    Kernel(
        "up (training)",
        _up(True),
        _up_expected,
        _rows_of("a", "z"),
        lambda t: (2 * t.I, t.H),
        lambda t: _weights(t, 2 * t.I, t.T * t.H + 3 * t.rows * t.I),
        hopper,
        "up_tile",
        (TALL, BROAD, PAIR, WIDE, LONE),
        _up_variant(True),
    ),
    Kernel(
        "up (inference)",
        _up(False),
        lambda data, expert: {"a": _up_expected(data, expert)["a"]},
        _rows_of("a", "z"),
        lambda t: (2 * t.I, t.H),
        lambda t: _weights(t, 2 * t.I, t.T * t.H + t.rows * t.I),
        hopper,
        "up_tile",
        (TALL, BROAD, PAIR, WIDE, LONE, SMALL),
        _up_variant(False),
    ),
    Kernel(
        "down",
        lambda data: data.operations.down_projection(data.a, data.w_down, None, data.plan),
        lambda data, expert: {"y": data.a[data.rows(expert)[0]].float() @ data.w_down[expert].float().mT},
        _rows_of("y"),
        lambda t: (t.H, t.I),
        lambda t: _weights(t, t.I, t.rows * (t.I + t.H)),
        hopper,
        "down_tile",
        (TALL, BROAD, SQUARE, WIDE, SMALL),
        lambda tile: [variants.down_projection(tile=tile, dtype="bfloat16", bias=False)],
    ),
    Kernel(
        "activation backward",
        lambda data: data.operations.activation_backward(
            data.dout, data.z, data.w_down, None, data.score, data.plan, **LAYOUT, need_dz=True, need_dscore=True, need_scaled_a=True
        ),
        _backward_expected,
        _rows_of("dz", "", "scaled_a"),
        lambda t: (t.I, t.H),
        lambda t: _weights(t, t.I, t.T * t.H + 5 * t.rows * t.I),
        hopper_backward,
        "activation_backward_tile",
        (WIDE, LONE, PAIR, TALL),
        lambda tile: [
            variants.activation_backward(tile=tile, **BUILD, dz=True, dscore=True, scaled_a=True),
            variants.score_grad(dtype="bfloat16", bias=False),
        ],
    ),
    Kernel(
        "dW_down",
        lambda data: data.operations.down_weight_grad(data.dout, data.a, data.score, data.plan, need_weight=True, need_bias=False)[0],
        lambda data, expert: {"dw": data.dout[data.rows(expert)[1]].float().mT @ data.a[data.rows(expert)[0]].float()},
        lambda data, result, expert: {"dw": result[expert]},
        lambda t: (t.H, t.I),
        lambda t: _weights(t, t.I, t.T * t.H + t.rows * t.I),
        hopper_backward,
        "weight_grad_tile",
        (WIDE, LONE, TALL, PAIR),
        lambda tile: [variants.weight_grad(tile=tile, dtype="bfloat16", transposed=False)],
    ),
    Kernel(
        "dx rows",
        lambda data: data.operations.dx_rows(data.dz, data.w_up, data.plan),
        lambda data, expert: {"dx": data.dz[data.rows(expert)[0]].float() @ data.w_up[expert].float()},
        _rows_of("dx"),
        lambda t: (t.H, 2 * t.I),
        lambda t: _weights(t, 2 * t.I, t.rows * (2 * t.I + t.H)),
        hopper_backward,
        "dx_tile",
        (TALL, WIDE, SQUARE, BROAD),
        lambda tile: [variants.dx_rows(tile=tile, dtype="bfloat16")],
    ),
    Kernel(
        "dW_up",
        lambda data: data.operations.up_weight_grad(data.x, data.dz, data.plan, need_weight=True, need_bias=False)[0],
        lambda data, expert: {"dw": data.dz[data.rows(expert)[0]].float().mT @ data.x[data.rows(expert)[1]].float()},
        lambda data, result, expert: {"dw": result[expert]},
        lambda t: (2 * t.I, t.H),
        lambda t: _weights(t, 2 * t.I, t.T * t.H + 2 * t.rows * t.I),
        hopper_backward,
        "weight_grad_tile",
        (WIDE, LONE, TALL, PAIR),
        lambda tile: [variants.weight_grad(tile=tile, dtype="bfloat16", transposed=True)],
    ),
    Kernel(
        "gather-sum",
        lambda data: dispatch.gather_sum(data.y, data.score, data.plan),
        _sums_expected,
        lambda data, result, expert: {"o": result[data.rows(expert)[1]]},
        lambda t: (t.H, 1),
        lambda t: 2 * (t.rows + t.T) * t.H,
    ),
)


@contextlib.contextmanager
def using(kernel: Kernel, tile: Tile | None) -> Iterator[None]:
    """The kernel's host half takes ``tile`` whatever the shape; None leaves it the rule of the table."""
    if tile is None:
        yield
        return
    replaced = {kernel.tile_rule: lambda **sizes: tile, **_choices(kernel.tile_module, tile)}
    before = {name: getattr(kernel.tile_module, name) for name in replaced}
    for name, replacement in replaced.items():
        setattr(kernel.tile_module, name, replacement)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(kernel.tile_module, name, original)


@functools.cache
def _choices(module: types.ModuleType, tile: Tile) -> dict[str, Callable]:
    """The functions in which a host half keeps a tile's choice by sizes, with a memory of this tile's own."""
    kept = [name for name in ("_up_launch", "_down_launch") if hasattr(module, name)]
    return {name: functools.lru_cache(maxsize=1024)(getattr(module, name).__wrapped__) for name in kept}


def error_of(kernel: Kernel, data: Data, seed: int) -> float:
    """Largest relative Frobenius error of the kernel's result over a few experts that have rows."""
    with_rows = data.plan.offsets.diff().nonzero().flatten().tolist()
    generator = torch.Generator().manual_seed(seed)
    chosen = {with_rows[place] for place in torch.randint(len(with_rows), (CHECKED_EXPERTS,), generator=generator)}
    result, worst = kernel.run(data), 0.0
    for expert in chosen | {with_rows[-1]}:
        got = kernel.pick(data, result, expert)
        for name, want in kernel.expected(data, expert).items():
            error = (got[name].float() - want).norm() / want.norm()
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
    return worst


def bound(kernel: Kernel, thiek: Thiek, device: torch.device) -> timing.Variant:
    """The kernel's product as torch.bmm of equal experts; of gather-sum, which has none, a copy of as many bytes."""
    columns, reduced = kernel.products(thiek)
    if reduced == 1:
        source = torch.randint(0, 255, (kernel.bytes(thiek) // 2,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return timing.Variant(lambda _: target.copy_(source))
    rows = timing.bound_rows(thiek)
    if kernel.name.startswith("dW"):
        left, right = (torch.randn(thiek.E, rows, width, device=device).bfloat16() for width in (columns, reduced))
        return timing.Variant(lambda _: torch.bmm(left.mT, right))
    left = torch.randn(thiek.E, rows, reduced, device=device).bfloat16()
    right = torch.randn(thiek.E, columns, reduced, device=device).bfloat16()
    return timing.Variant(lambda _: torch.bmm(left, right.mT))


@functools.cache
def machine(options: Options) -> tuple[float, float]:
    """(FLOPs, bytes) that the device reaches a millisecond in this run."""
    size, count = (64, 2**16) if options.quick else (8192, 2**30)
    left, right = (torch.randn(size, size, device=options.device).bfloat16() for _ in range(2))
    source, target = (torch.empty(count, dtype=torch.uint8, device=options.device).random_() for _ in range(2))
    ways = {"product": timing.Variant(lambda _: left @ right), "copy": timing.Variant(lambda _: target.copy_(source))}
    times = timing.measure(ways, device=options.device, **effort(options))
    return 2 * size**3 / times["product"].ms, 2 * count / times["copy"].ms


def items(options: Options) -> list[Item]:
    return _items(options, all_tiles=False)


def items_of_all_tiles(options: Options) -> list[Item]:
    return _items(options, all_tiles=True)


def _items(options: Options, *, all_tiles: bool) -> list[Item]:
    """One a kernel and shape."""
    suite, shapes = ("tiles" if all_tiles else "kernels"), [options.thiek(*thiek) for thiek in SHAPES]
    data = functools.lru_cache(maxsize=1)(Data)  # the kernels of one shape follow each other
    found = []
    for thiek in dict.fromkeys(shapes):
        for kernel in KERNELS:
            tiles = kernel.tiles if all_tiles else ()
            if all_tiles and not (tiles and options.backend == "hopper"):
                continue
            name = f"{suite}/{kernel.name.replace(' ', '-')}/{size_text(thiek)}"
            found.append(Item(name, functools.partial(_measure, kernel, thiek, data, tiles, options, name)))
    return found


def _measure(
    kernel: Kernel, thiek: Thiek, data: Callable[..., Data], tiles: tuple[Tile, ...], options: Options, name: str
) -> list[dict[str, Any]]:
    """A cell for each tile; one that cannot be run is a failed cell with its reason, and the others still run."""
    own, (columns, reduced) = data(thiek, options), kernel.products(thiek)
    flops, moved = 2.0 * thiek.rows * columns * reduced, kernel.bytes(thiek)
    flops_per_ms, bytes_per_ms = machine(options)
    floor_ms = max(flops / flops_per_ms, moved / bytes_per_ms)
    names = {f"{name}/{tile.name}": tile for tile in tiles} or {name: None}
    cells, runs, errors = [], {}, {}
    for way, tile in names.items():
        try:
            with using(kernel, tile):
                errors[way] = error_of(kernel, own, options.seed)
        except Exception as error:
            cells.append(broken(way, f"{type(error).__name__}: {error}".splitlines()[0]))
            continue
        runs[way] = timing.Variant(functools.partial(_run, kernel, tile, own))
    times = timing.measure({**runs, "bound": bound(kernel, thiek, options.device)}, device=options.device, **effort(options))
    for way in runs:
        ms = times[way].ms
        cells.append(
            cell(
                options,
                way,
                mode=kernel.name,
                bound=Bound(errors[way], "relative error of the worst expert", LARGEST_ERROR, "at most", everywhere=True),
                thiek=thiek,
                routing="softmax",
                ms=ms,
                ms_spread=times[way].ms_spread,
                tflops=timing.tflops(flops, ms),
                bound_ms=times["bound"].ms,
                bound_share=times["bound"].ms / ms,
                floor_ms=floor_ms,
                floor_share=floor_ms / ms,
            )
        )
    return cells


def _run(kernel: Kernel, tile: Tile | None, data: Data, _: object) -> None:
    with using(kernel, tile):
        kernel.run(data)


def tile_variants() -> list[Variant]:
    """What the suite ``tiles`` loads."""
    return list(dict.fromkeys(variant for kernel in KERNELS for tile in kernel.tiles for variant in kernel.variant(tile)))


def main() -> int:
    """Builds the variants of the suite ``tiles``."""
    parser = argparse.ArgumentParser(prog="python -m testing.measure.kernels", description=main.__doc__)
    parser.add_argument("out", metavar="DIR", help="where the kernels go; name it in SONICMOE_KERNELS on the GPU machine")
    failures = build_all(
        tile_variants(),
        parser.parse_args().out,
        jobs=os.cpu_count() or 1,
        on_done=lambda variant, failure: print(f"{'FAILED' if failure else 'built'} {variant.name}", flush=True),
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
