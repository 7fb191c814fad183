"""Which variants and objects there are: packages list what is to be prebuilt, folders hold what was."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from cute_runtime.sources import PROJECT_PACKAGES, source_path
from cute_runtime.variant import Variant

KERNELS_VARIABLE = "SONICMOE_KERNELS"
"""Environment variable: folders of kernel objects to look in first, separated as in PATH."""


def prebuilt_variants(packages: list[str] | None = None) -> list[Variant]:
    """The variants that are built with the project: ``prebuilt_variants()`` of each ``<package>/kernels/variants.py``.

    Args:
        packages: packages to ask; by default all of the project's that have kernels.

    Raises:
        ValueError: a named package lists no variants, or two kernels would share a file.
    """
    variants = []
    for package in PROJECT_PACKAGES if packages is None else packages:
        path = source_path(f"{package.replace('.', '/')}/kernels/variants.py")
        if path:
            variants += _run_alone(path, f"{package}.kernels.variants").prebuilt_variants()
        elif packages is not None:
            raise ValueError(f"package={package!r}: must have a module {package}.kernels.variants")
    if len(set(variants)) != len(variants):
        repeated = sorted({variant.name for variant in variants if variants.count(variant) > 1})
        raise ValueError(f"prebuilt_variants: {', '.join(repeated)}: must be listed once")
    return variants


def _run_alone(path: Path, name: str) -> ModuleType:
    """The module of a file without its parent packages: listing kernels must not import torch, nor need it."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prebuilt_folders(kernel: str) -> list[Path]:
    """Where the objects of a kernel module may lie, in the order in which they are tried.

    The folders named by ``SONICMOE_KERNELS``; ``prebuilt/`` beside the kernel's module (Bazel's runfiles); ``prebuilt/`` in this
    package (the wheel).
    """
    folders = [Path(folder) for folder in os.environ.get(KERNELS_VARIABLE, "").split(os.pathsep) if folder]
    path = kernel.replace(".", "/")
    module = source_path(f"{path}.py") or source_path(f"{path}.c")
    if module:
        folders.append(module.parent / "prebuilt")
    folders.append(Path(__file__).with_name("prebuilt"))
    return folders
