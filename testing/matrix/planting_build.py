"""Builds the kernels of planted trees beforehand, on any machine with the compiler, so that a GPU machine needs none for the selftest.

For each defect in a kernel, the variants that its cell loads and of whose sources the changed file is one. The others are those that are
built anyway. Each is compiled by `python -m cute_runtime build` from the planted tree, into a folder of the defect's name.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from cute_runtime import Variant
from cute_runtime.objects import CorruptObjectError, object_name, split_object
from cute_runtime.sources import changed_sources, sources
from testing.matrix.cells import Matrix, Profile
from testing.matrix.kernels import cell_variants
from testing.matrix.planting_source import SourceDefect, edited, folder_name, plant, planted_folders


class PlantedKernel(NamedTuple):
    """One object to build."""

    defect: str
    variant: Variant

    @property
    def label(self) -> str:
        return f"{self.defect}: {self.variant.name}"


def planted_kernels(defects: Mapping[str, SourceDefect], matrix: Matrix, profile: Profile) -> list[PlantedKernel]:
    """What the defects' cells load that is not what it is without the defect."""
    cells = {cell.name: cell for cell in matrix.cells}
    loaded = {name: cell_variants(cells[name], profile) for name in {defect.cell for defect in defects.values()}}
    # All variants of a kernel have the same sources.
    files = {kernel: sources(Variant(kernel)).keys() for kernel in {variant.kernel for variants in loaded.values() for variant in variants}}
    return [
        PlantedKernel(name, variant)
        for name, defect in defects.items()
        for variant in loaded[defect.cell]
        if defect.file in files[variant.kernel]
    ]


def missing_kernels(defects: Mapping[str, SourceDefect], matrix: Matrix, profile: Profile) -> list[PlantedKernel]:
    """Those of them of which no folder of ``SONICMOE_KERNELS`` holds an object of today's sources."""
    return [
        kernel
        for kernel in planted_kernels(defects, matrix, profile)
        if not any(_fits(folder / object_name(kernel.variant), defects[kernel.defect]) for folder in planted_folders(kernel.defect))
    ]


def _fits(path: Path, defect: SourceDefect) -> bool:
    """Whether the object was made of the file with the defect and of the other sources as they are here."""
    try:
        recorded = dict(split_object(path)[0].sources)
    except (FileNotFoundError, CorruptObjectError):
        return False
    planted = hashlib.sha256(edited(defect).encode()).hexdigest()
    return recorded.pop(defect.file, None) == planted and not changed_sources(recorded)


def build_planted(
    defects: Mapping[str, SourceDefect],
    kernels: list[PlantedKernel],
    out: Path,
    *,
    jobs: int,
    compile_one: Callable[[Path, Variant, Path], str],
    ended: Callable[[str, bool, str], None],
) -> list[str]:
    """Build the kernels into ``out``, ``jobs`` at a time; objects that are up to date are kept.

    Args:
        compile_one: `compile_in`, or what stands in for it.
        ended: told of each kernel as it ends: its name, whether it was built, and why not.

    Returns:
        The names of those that do not compile.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="planted-") as trees, ThreadPoolExecutor(jobs) as threads:
        places = {name: Path(trees) / folder_name(name) for name in {kernel.defect for kernel in kernels}}
        for name, tree in places.items():
            tree.mkdir()
            plant(defects[name], tree)
        running = {
            threads.submit(compile_one, places[kernel.defect], kernel.variant, out.absolute() / folder_name(kernel.defect)): kernel
            for kernel in kernels
        }
        for future in as_completed(running):
            why = future.result()
            if why:
                failed.append(running[future].label)
            ended(running[future].label, not why, why)
    return failed


def compile_in(tree: Path, variant: Variant, out: Path) -> str:
    """Compile one variant of a tree's sources into ``out``, in a process that imports this tree; returns why it failed, or nothing."""
    command = [sys.executable, "-m", "cute_runtime", "build", "--quiet", "--variant", variant.name, "--out", str(out), "--jobs", "1"]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    return "" if ran.returncode == 0 else (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
