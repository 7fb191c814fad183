"""What the tests say of a layer, as the functions of `sonicmoe.kernels.variants` take it."""

from typing import Any

import torch

from sonicmoe.activations import is_gated
from sonicmoe.backends.arguments import DTYPES


def kernel_options(
    activation: str = "swiglu", layout: str = "interleaved", bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """dtype, activation, interleaved and bias of a layer's kernels."""
    interleaved = is_gated(activation) and layout == "interleaved"
    return {"dtype": DTYPES[dtype], "activation": activation, "interleaved": interleaved, "bias": bias}
