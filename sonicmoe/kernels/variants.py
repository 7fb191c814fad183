"""The variants of this package's kernels, by the parameters of their ``trace``, and those that are built beforehand."""

from itertools import product

from cute_runtime import Variant
from sonicmoe.kernels.tiles import BROAD, PAIR, SQUARE, TALL, Tile


def up_projection(*, tile: Tile, dtype: str, activation: str, interleaved: bool, store_z: bool, bias: bool) -> Variant:
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
        },
    )


def down_projection(*, tile: Tile, dtype: str, bias: bool) -> Variant:
    """kernels/down_projection.py: dtype bfloat16 or float16."""
    return Variant("sonicmoe.kernels.down_projection", {"tile": tile.name, "dtype": dtype, "bias": bias})


def prebuilt_variants() -> list[Variant]:
    """What most models use: bfloat16, swiglu in both layouts, no bias, every tile of the table, for training and inference."""
    up = [
        up_projection(tile=tile, dtype="bfloat16", activation="swiglu", interleaved=interleaved, store_z=store_z, bias=False)
        for tile, interleaved, store_z in product((TALL, PAIR), (True, False), (True, False))
    ]
    return up + [down_projection(tile=tile, dtype="bfloat16", bias=False) for tile in (TALL, BROAD, SQUARE)]
