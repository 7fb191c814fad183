"""The variants of this package's kernels, by the parameters of their ``trace``, and those that are built beforehand."""

import functools
from itertools import product

from cute_runtime import Variant
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, SMALL, TALL, WIDE, Tile


def _stored(transposed: bool) -> dict[str, bool]:
    """The parameter of weights whose last two dimensions are exchanged in memory; without it they are not."""
    return {"transposed": True} if transposed else {}


def up_projection(
    *, tile: Tile, dtype: str, activation: str, interleaved: bool, store_z: bool, bias: bool, transposed: bool = False
) -> Variant:
    """kernels/up_projection.py: dtype bfloat16 or float16; interleaved must be False for an activation without a gate."""
    return Variant(
        "sonicmoe.kernels.up_projection",
        {
            "tile": tile.name,
            "dtype": dtype,
            "activation": activation,
            "interleaved": interleaved,
            "store_z": store_z,
            "bias": bias,
        }
        | _stored(transposed),
    )


def up_halves(*, interleaved: bool, transposed: bool) -> bool:
    """What `tiles.up_tile` asks of the weights' layout; also of those without a gate, which could do without it."""
    return transposed and not interleaved


def down_projection(*, tile: Tile, dtype: str, bias: bool, transposed: bool = False) -> Variant:
    """kernels/down_projection.py: dtype bfloat16 or float16."""
    return Variant("sonicmoe.kernels.down_projection", {"tile": tile.name, "dtype": dtype, "bias": bias} | _stored(transposed))


@functools.cache  # asked for in every backward; making a Variant takes ten microseconds
def activation_backward(
    *, tile: Tile, dtype: str, activation: str, interleaved: bool, dz: bool, dscore: bool, scaled_a: bool, transposed: bool = False
) -> Variant:
    """kernels/activation_backward.py: dz, dscore, scaled_a say which results are wanted, one of the first two at least."""
    return Variant(
        "sonicmoe.kernels.activation_backward",
        {
            "tile": tile.name,
            "dtype": dtype,
            "activation": activation,
            "interleaved": interleaved,
            "dz": dz,
            "dscore": dscore,
            "scaled_a": scaled_a,
        }
        | _stored(transposed),
    )


@functools.cache
def score_grad(*, dtype: str, bias: bool) -> Variant:
    """kernels/score_grad.py: dtype of dout and b_down, which count only with ``bias``."""
    return Variant("sonicmoe.kernels.score_grad", {"dtype": dtype if bias else "bfloat16", "bias": bias})


@functools.cache
def weight_grad(*, tile: Tile, dtype: str, transposed: bool, add: bool = False) -> Variant:
    """kernels/weight_grad.py: transposed for dw_up, not for dw_down; add into a float32 buffer, or store in ``dtype``."""
    return Variant(
        "sonicmoe.kernels.weight_grad",
        {"tile": tile.name, "dtype": dtype, "transposed": transposed} | ({"add": True} if add else {}),
    )


@functools.cache
def bias_grad(*, dtype: str, gathered: bool) -> Variant:
    """kernels/bias_grad.py: gathered for db_down, not for db_up."""
    return Variant("sonicmoe.kernels.bias_grad", {"dtype": dtype, "gathered": gathered})


@functools.cache
def dx_rows(*, tile: Tile, dtype: str, transposed: bool = False) -> Variant:
    """kernels/dx_rows.py."""
    return Variant("sonicmoe.kernels.dx_rows", {"tile": tile.name, "dtype": dtype} | _stored(transposed))


def up_variants(*, dtype: str, activation: str, interleaved: bool, bias: bool, transposed: bool = False) -> list[Variant]:
    """All that the up-projection of a layer with these options can load, whatever its sizes, in inference and in training."""
    layer = {"dtype": dtype, "activation": activation, "interleaved": interleaved, "bias": bias, "transposed": transposed}
    large = (TALL, PAIR, WIDE) if up_halves(interleaved=interleaved, transposed=transposed) else (TALL, PAIR, WIDE, BROAD)
    tiles = [up_projection(tile=tile, **layer, store_z=store_z) for tile, store_z in product(large, (True, False))]
    return [*tiles, up_projection(tile=SMALL, **layer, store_z=False)]


def down_variants(*, dtype: str, bias: bool, transposed: bool = False) -> list[Variant]:
    """The same of the down-projection."""
    return [down_projection(tile=tile, dtype=dtype, bias=bias, transposed=transposed) for tile in (SMALL, TALL, BROAD, WIDE)]


def backward_variants(
    *,
    dtype: str,
    activation: str,
    interleaved: bool,
    bias: bool,
    transposed: bool = False,
    results: tuple[str, ...] = ("dz", "dscore", "scaled_a"),
) -> list[Variant]:
    """The same of the backward. ``results``: of activation_backward.py; all of them where all of the layer's parameters train."""
    wanted = {name: name in results for name in ("dz", "dscore", "scaled_a")}
    layer = {"dtype": dtype, "activation": activation, "interleaved": interleaved, "transposed": transposed}
    first = [activation_backward(tile=tile, **layer, **wanted) for tile in (WIDE, PAIR, LONE, TALL)] + [score_grad(dtype=dtype, bias=bias)]
    weights = weight_grads(dtype=dtype, add=False)
    biases = [bias_grad(dtype=dtype, gathered=gathered) for gathered in (False, True)] if bias else []
    return first + weights + biases + [dx_rows(tile=tile, dtype=dtype, transposed=transposed) for tile in (TALL, WIDE, BROAD)]


def layer_variants(*, dtype: str, activation: str, interleaved: bool, bias: bool, transposed: bool = False) -> list[Variant]:
    """All that a layer with these options can load, whatever its sizes, in inference and in training of all its parameters."""
    layer = {"dtype": dtype, "activation": activation, "interleaved": interleaved, "bias": bias, "transposed": transposed}
    return up_variants(**layer) + down_variants(dtype=dtype, bias=bias, transposed=transposed) + backward_variants(**layer)


def weight_grads(*, dtype: str, add: bool) -> list[Variant]:
    """Both weights' gradients, stored, or added into float32 buffers."""
    return [weight_grad(tile=TALL, dtype=dtype, transposed=side, add=add) for side in (False, True)]


def prebuilt_variants() -> list[Variant]:
    """What most models use: bfloat16, swiglu in both layouts, no bias; with main gradients too."""
    layouts = [layer_variants(dtype="bfloat16", activation="swiglu", interleaved=interleaved, bias=False) for interleaved in (True, False)]
    return list(dict.fromkeys(variant for variants in (*layouts, weight_grads(dtype="bfloat16", add=True)) for variant in variants))
