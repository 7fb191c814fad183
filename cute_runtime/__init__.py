"""Ground floor: build, cache, load and launch CuTe-DSL kernels. Only this package knows the compiler's interface.

A kernel has two halves of the same name. The device half, ``<package>/kernels/<name>.py``, imports the compiler and is imported
only by the compile step; its ``trace(**params)`` returns what is to be compiled. The host half, ``<package>/...``, checks the
arguments, picks the :class:`Variant` and calls :func:`load`. ``<package>/kernels/variants.py`` lists what is built beforehand.

Importing this package imports neither the compiler nor torch nor tvm_ffi, and touches no GPU. What only building and inspecting
kernels needs is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING

from cute_runtime.checks import BACKENDS, INT32_ELEMENTS, check_launch, is_supported_device, on_device
from cute_runtime.discover import prebuilt_variants
from cute_runtime.load import MissingKernelError, find, load, prepare
from cute_runtime.variant import Variant

if TYPE_CHECKING:
    from cute_runtime.builder import KernelCompileError, MissingToolError, build
    from cute_runtime.resources import Resources, read_resources

__all__ = [
    "BACKENDS",
    "INT32_ELEMENTS",
    "KernelCompileError",
    "MissingKernelError",
    "MissingToolError",
    "Resources",
    "Variant",
    "build",
    "check_launch",
    "find",
    "is_supported_device",
    "load",
    "on_device",
    "prebuilt_variants",
    "prepare",
    "read_resources",
]

# No module may have the name of one of these: importing it would put it in the function's place.
_HOMES = {
    "KernelCompileError": "builder",
    "MissingToolError": "builder",
    "Resources": "resources",
    "build": "builder",
    "read_resources": "resources",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
