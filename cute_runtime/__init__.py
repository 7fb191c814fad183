"""Ground floor: build, cache, load and launch CuTe-DSL kernels. Only this package knows the compiler's interface.

A kernel has two halves of the same name. The device half, ``<package>/kernels/<name>.py``, imports the compiler and is imported
only by the compile step; its ``trace(**params)`` returns what is to be compiled. The host half, ``<package>/...``, checks the
arguments, picks the :class:`Variant` and calls :func:`load`. ``<package>/kernels/variants.py`` lists what is built beforehand.

Importing this package imports neither the compiler nor torch nor tvm_ffi, and touches no GPU.
"""

from cute_runtime.build import KernelCompileError, MissingToolError, build
from cute_runtime.checks import BACKENDS, INT32_ELEMENTS, check_launch, is_supported_device, on_device
from cute_runtime.discover import prebuilt_variants
from cute_runtime.load import MissingKernelError, find, load
from cute_runtime.resources import Resources, read_resources
from cute_runtime.variant import Variant

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
    "read_resources",
]
