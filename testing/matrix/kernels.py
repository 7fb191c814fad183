"""The kernels that the matrix needs beside those that are built with the project: every cell runs without compiling anything."""

from cute_runtime import Variant, prebuilt_variants
from sonicmoe.kernels.variants import layer_variants
from testing.matrix.cells import LayerCell, Matrix, SpeedCell
from testing.matrix.plan import UNGATED

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""float32 cells run on the reference backend, which has no kernels."""


def matrix_variants(matrix: Matrix) -> list[Variant]:
    """What layers and speed cells can load on an sm_90 GPU, without what is prebuilt, sorted by name."""
    found: set[Variant] = set()
    for cell in matrix.cells:
        if isinstance(cell, LayerCell) and cell.dtype in DTYPES:
            interleaved = cell.activation not in UNGATED and cell.layout == "interleaved"
            options = {"activation": cell.activation, "interleaved": interleaved, "bias": cell.bias}
            found |= {*layer_variants(dtype=DTYPES[cell.dtype], **options)}
        elif isinstance(cell, SpeedCell):
            found |= {*layer_variants(dtype=DTYPES[cell.dtype], activation="swiglu", interleaved=True, bias=False)}
    return sorted(found - {*prebuilt_variants()}, key=lambda variant: variant.name)
