"""Each kernel of the layer alone, by shape and tile: beside the same product as torch.bmm, and beside its own floor.

A kernel's floor is max(FLOPs / matrix peak, bytes / copy bandwidth), both measured in the same run: the peak by a bfloat16 product of
8192 x 8192 x 8192, the bandwidth by a device copy of 1 GiB. Random top-K routing, normal data; all tiles of a kernel are timed in
turns with the product of equal experts. Each result is checked first, on experts drawn at random, against float32.
T tokens, H hidden size, I intermediate size, E experts, K experts per token, R = T*K rows, Z = 2I (swiglu).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import dispatch
from cute_runtime import Variant
from routing import top_k
from sonicmoe import timing
from sonicmoe.activations import activate, activation_gradient
from sonicmoe.backends import hopper, hopper_backward
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, SLIM, SQUARE, TALL, WIDE, Tile
from sonicmoe.thiek import Thiek

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
    """One shape's tensors, all of which a training step holds too."""

    def __init__(self, thiek: Thiek, device: str, seed: int) -> None:
        T, H, I, E, K = self.thiek = thiek
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

        routing = top_k(torch.randn(T, E, generator=generator, device=device), K)
        self.plan = dispatch.plan(routing.token_index, routing.expert_index, num_tokens=T, num_experts=E, slots_per_token=K)
        self.score = routing.score
        self.x, self.dout = normal(T, H), normal(T, H)
        self.w_up, self.w_down = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
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
    tile_module: ModuleType | None = None
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


def _rows_of(*names: str) -> Callable[[Data, Any, int], dict]:
    """Picks an expert's rows of a result, or of several by name."""

    def pick(data: Data, result: Any, expert: int) -> dict:
        own, _, _ = data.rows(expert)
        results = result if isinstance(result, tuple) else (result,)
        return {name: tensor[own] for name, tensor in zip(names, results, strict=True) if name and tensor is not None}

    return pick


def _up(store_z: bool) -> Callable[[Data], Any]:
    return lambda data: hopper.up_projection(data.x, data.w_up, None, data.plan, **LAYOUT, store_z=store_z)


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
        (TALL, PAIR, WIDE, LONE),
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
        (TALL, PAIR, WIDE, LONE),
        _up_variant(False),
    ),
    Kernel(
        "down",
        lambda data: hopper.down_projection(data.a, data.w_down, None, data.plan),
        lambda data, expert: {"y": data.a[data.rows(expert)[0]].float() @ data.w_down[expert].float().mT},
        _rows_of("y"),
        lambda t: (t.H, t.I),
        lambda t: _weights(t, t.I, t.rows * (t.I + t.H)),
        hopper,
        "down_tile",
        (TALL, BROAD, SQUARE, WIDE),
        lambda tile: [variants.down_projection(tile=tile, dtype="bfloat16", bias=False)],
    ),
    Kernel(
        "activation backward",
        lambda data: hopper_backward.activation_backward(
            data.dout, data.z, data.w_down, None, data.score, data.plan, **LAYOUT, need_dz=True, need_dscore=True, need_scaled_a=True
        ),
        _backward_expected,
        _rows_of("dz", "", "scaled_a"),
        lambda t: (t.I, t.H),
        lambda t: _weights(t, t.I, t.T * t.H + 5 * t.rows * t.I),
        hopper_backward,
        "activation_backward_tile",
        (WIDE, LONE, SLIM, SQUARE),
        lambda tile: [
            variants.activation_backward(tile=tile, **BUILD, dz=True, dscore=True, scaled_a=True),
            variants.score_grad(dtype="bfloat16", bias=False),
        ],
    ),
    Kernel(
        "dW_down",
        lambda data: hopper_backward.down_weight_grad(data.dout, data.a, data.score, data.plan, need_weight=True, need_bias=False)[0],
        lambda data, expert: {"dw": data.dout[data.rows(expert)[1]].float().mT @ data.a[data.rows(expert)[0]].float()},
        lambda data, result, expert: {"dw": result[expert]},
        lambda t: (t.H, t.I),
        lambda t: _weights(t, t.I, t.T * t.H + t.rows * t.I),
        hopper_backward,
        "weight_grad_tile",
        (WIDE, LONE, TALL, PAIR, SLIM),
        lambda tile: [variants.weight_grad(tile=tile, dtype="bfloat16", transposed=False)],
    ),
    Kernel(
        "dx rows",
        lambda data: hopper_backward.dx_rows(data.dz, data.w_up, data.plan),
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
        lambda data: hopper_backward.up_weight_grad(data.x, data.dz, data.plan, need_weight=True, need_bias=False)[0],
        lambda data, expert: {"dw": data.dz[data.rows(expert)[0]].float().mT @ data.x[data.rows(expert)[1]].float()},
        lambda data, result, expert: {"dw": result[expert]},
        lambda t: (2 * t.I, t.H),
        lambda t: _weights(t, 2 * t.I, t.T * t.H + 2 * t.rows * t.I),
        hopper_backward,
        "weight_grad_tile",
        (WIDE, LONE, TALL, PAIR, SLIM),
        lambda tile: [variants.weight_grad(tile=tile, dtype="bfloat16", transposed=True)],
    ),
    Kernel(
        "gather-sum",
        lambda data: dispatch.gather_sum(data.y, data.score, data.plan),
        lambda data, expert: {},
        lambda data, result, expert: {},
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
    rule = getattr(kernel.tile_module, kernel.tile_rule)
    setattr(kernel.tile_module, kernel.tile_rule, lambda **sizes: tile)
    try:
        yield
    finally:
        setattr(kernel.tile_module, kernel.tile_rule, rule)


def needed_variants(*, all_tiles: bool) -> list[Variant]:
    """What must be built for a run on a machine without a compiler, beyond the prebuilt variants."""
    found = {variant: None for kernel in KERNELS for tile in kernel.tiles for variant in kernel.variant(tile)} if all_tiles else {}
    return list(found)


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


def bound(kernel: Kernel, thiek: Thiek, device: str) -> timing.Variant:
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


@dataclass(frozen=True)
class Machine:
    """What the GPU reaches in this run."""

    flops_per_ms: float
    bytes_per_ms: float

    @classmethod
    def measure(cls, device: str) -> "Machine":
        size, count = 8192, 2**30
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        source, target = (torch.empty(count, dtype=torch.uint8, device=device).random_() for _ in range(2))
        times = timing.measure(
            {"product": timing.Variant(lambda _: left @ right), "copy": timing.Variant(lambda _: target.copy_(source))}, device=device
        )
        return cls(2 * size**3 / times["product"].ms, 2 * count / times["copy"].ms)

    def floor_ms(self, flops: float, moved: float) -> float:
        return max(flops / self.flops_per_ms, moved / self.bytes_per_ms)


def measure_shape(
    thiek: Thiek,
    machine: Machine,
    *,
    kernels: tuple[Kernel, ...] = KERNELS,
    all_tiles: bool,
    device: str,
    seed: int,
    on_done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A recorded cell for every kernel and tile of one shape; a tile that cannot be run is a failed cell with its reason."""
    data, cells = Data(thiek, device, seed), []
    for kernel in kernels:
        columns, reduced = kernel.products(thiek)
        flops, moved = 2.0 * thiek.rows * columns * reduced, kernel.bytes(thiek)
        names = {tile.name: tile for tile in kernel.tiles} if all_tiles and kernel.tiles else {"table": None}
        runs, errors = {}, {}
        for name, tile in names.items():
            with using(kernel, tile):
                try:
                    errors[name] = error_of(kernel, data, seed)
                except Exception as error:  # one variant that does not load must not lose the others' times
                    errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
            runs[name] = timing.Variant(_runner(kernel, tile, data))
        times = timing.measure({**runs, "bound": bound(kernel, thiek, device)}, device=device, warmup_s=0.1, measure_s=0.1, max_repeats=30)
        for name in names:
            cell = {
                "name": f"kernels/{kernel.name}/{name}",
                "thiek": list(thiek),
                "routing": "softmax",
                "dtype": "bf16",
                "mode": kernel.name,
            }
            if isinstance(errors[name], str):
                cells.append(cell | {"status": "failed", "passed": False, "why": errors[name]})
                continue
            passed = errors[name] <= LARGEST_ERROR
            floor_ms, ms = machine.floor_ms(flops, moved), times[name].ms
            cells.append(
                cell
                | {
                    "ms": ms,
                    "ms_spread": times[name].ms_spread,
                    "tflops": timing.tflops(flops, ms),
                    "bound_ms": times["bound"].ms,
                    "ratio": times["bound"].ms / ms,
                    "floor_ms": floor_ms,
                    "floor_share": floor_ms / ms,
                    "errors": {"result": {"worst_block": errors[name]}},
                    "status": "passed" if passed else "failed",
                    "passed": passed,
                    "why": "" if passed else f"worst expert's error {errors[name]:.1e}: must be at most {LARGEST_ERROR:.1e}",
                }
            )
        on_done()
    return cells


def _runner(kernel: Kernel, tile: Tile | None, data: Data) -> Callable[[object], Any]:
    def run(_: object) -> Any:
        with using(kernel, tile):
            return kernel.run(data)

    return run
