"""The names that options take, without torch: a command line lists them at once, and what they stand for is looked up by them."""

from cute_runtime import BACKENDS

__all__ = ["ACTIVATIONS", "BACKENDS", "DTYPES", "LAYOUTS", "MODES", "ROUNDING_MODES"]

ACTIVATIONS = {
    "swiglu": True,
    "geglu": True,
    "reglu": True,
    "swiglu_oai": True,
    "silu": False,
    "gelu": False,
    "relu": False,
    "relu_squared": False,
}
"""Activation -> whether it is gated; `sonicmoe.activations` computes them."""

LAYOUTS = ("interleaved", "concatenated")
"""Of gate and up in w_up's rows."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
"""By the names that commands and recorded results use: PyTorch's."""

ROUNDING_MODES = ("nearest", "up", "down", "stochastic", "balanced")
"""Of token rounding."""

MODES = ("inference", "forward", "forward+backward", "backward")
"""In which a layer is timed."""
