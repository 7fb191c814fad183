"""The kernels of the matrix: what its cells need beside those that are built with the project, and what one cell loads."""

from typing import Any

from cute_runtime import Variant, prebuilt_variants
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import activation_backward_tile, down_tile, dx_tile, up_tile, weight_grad_tile
from sonicmoe.names import ROUNDING_MODES
from sonicmoe.thiek import Thiek
from testing.matrix.cells import SCORINGS, Cell, CountCell, LayerCell, Matrix, Profile, RoutingCell, RoutingSpec, SpeedCell
from testing.matrix.plan import UNGATED, experts_problem

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""float32 cells run on the reference backend, which has no kernels."""


def matrix_variants(matrix: Matrix) -> list[Variant]:
    """What layers and speed cells can load on an sm_90 GPU, without what is prebuilt, sorted by name."""
    found: set[Variant] = set()
    for cell in matrix.cells:
        if isinstance(cell, LayerCell) and cell.dtype in DTYPES:
            found |= {*variants.layer_variants(**layer_options(cell))}
        elif isinstance(cell, SpeedCell):
            found |= {*variants.layer_variants(dtype=DTYPES[cell.dtype], activation="swiglu", interleaved=True, bias=False)}
    return _by_name(found - {*prebuilt_variants()})


def cell_variants(cell: Cell, profile: Profile) -> list[Variant]:
    """What one cell loads on an sm_90 GPU at the profile's sizes, sorted by name; of routing and dispatch also what others like it load.

    Raises:
        TypeError: it is of a kind whose kernels nobody has asked for yet: speed cells and those of several processes.
    """
    if isinstance(cell, CountCell):
        return _by_name({variant for variant in prebuilt_variants(["dispatch"]) if variant.kernel == "dispatch.kernels.count"})
    if isinstance(cell, RoutingCell):
        return _by_name(_routing_and_dispatch(cell.routing, set()))
    if not isinstance(cell, LayerCell):
        raise TypeError(f"{cell.name}: must be a cell of a layer, of routing or of count_cumsum")
    if cell.dtype not in DTYPES:
        return _by_name(_routing_and_dispatch(cell.routing, set()))
    sizes, routing = experts_problem(cell, profile.limits)
    rows = {sizes.rows}
    if routing.method == "token_rounding":  # the rows that there is memory for, which is what the tiles are chosen by
        rows |= {sizes.rows + routing.tile_m * sizes.E}
    found = _routing_and_dispatch(cell.routing, {DTYPES[cell.dtype]})
    return _by_name(found.union(*(expert_variants(cell, sizes, count) for count in rows)))


def layer_options(cell: LayerCell) -> dict[str, Any]:
    """What `sonicmoe.kernels.variants` calls the options of a cell's layer."""
    interleaved = cell.activation not in UNGATED and cell.layout == "interleaved"
    return {"dtype": DTYPES[cell.dtype], "activation": cell.activation, "interleaved": interleaved, "bias": cell.bias}


def expert_variants(cell: LayerCell, sizes: Thiek, rows: int) -> set[Variant]:
    """What the experts of a layer cell load, in inference and in training, with these sizes and so many rows, whatever the GPU's memory:
    the choices of hopper.py and hopper_backward.py."""
    options = layer_options(cell)
    dtype, bias = options["dtype"], options["bias"]
    wide = {name: value for name, value in options.items() if name != "bias"}
    found = {variants.score_grad(dtype=dtype, bias=bias)}
    for fast_memory in (False, True):
        known = {"rows": rows, "experts": sizes.E, "fast_memory": fast_memory}
        found |= {
            variants.up_projection(tile=up_tile(**known, store_z=store, halves=False), **options, store_z=store) for store in (False, True)
        }
        found |= {
            variants.down_projection(tile=down_tile(**known, reduced=sizes.I), dtype=dtype, bias=bias),
            variants.activation_backward(tile=activation_backward_tile(**known), **wide, dz=True, dscore=True, scaled_a=True),
            variants.dx_rows(tile=dx_tile(**known), dtype=dtype),
        }
    found |= {variants.weight_grad(tile=weight_grad_tile(), dtype=dtype, transposed=side) for side in (False, True)}
    return found | {variants.bias_grad(dtype=dtype, gathered=side) for side in (False, True) if bias}


def _routing_and_dispatch(spec: RoutingSpec, dtypes: set[str]) -> set[Variant]:
    """Of the kernels of routing and dispatch, which are all prebuilt, those that do not belong to another way of routing or another dtype.

    The checks of the gather-sum take float32 and bfloat16 in every cell.
    """
    others = {
        "dtype": {*DTYPES.values()} - {"bfloat16", *dtypes},
        "form": {"csr" if spec.method == "top_k" else "uniform"},
        "index": {"int64"},
        "mode": {*ROUNDING_MODES} - {spec.mode},
        "scoring": {*SCORINGS} - {spec.scoring},
    }
    return {
        variant
        for variant in prebuilt_variants(["dispatch", "routing"])
        if not any(variant.params.get(name) in values for name, values in others.items())
    }


def _by_name(found: set[Variant]) -> list[Variant]:
    return sorted(found, key=lambda variant: variant.name)
