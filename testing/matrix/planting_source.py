"""How a defect is planted in a kernel: one text in one source file is replaced, in a tree of its own that a worker imports instead.

What follows is what follows of any change to a kernel: its prebuilt object is stale and passed over. The kernel with the fault is taken
from where `planting_build.build_planted` has put it, a folder of the defect's name in one of those that ``SONICMOE_KERNELS`` names; where
it is in none, it is compiled, and kept, under the key of its own sources. Kernels whose sources are untouched load as ever.
"""

import importlib
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from cute_runtime.discover import KERNELS_VARIABLE
from testing.matrix.pool import Work
from testing.matrix.sources import PACKAGES

ROOT = Path(__file__).absolute().parents[2]


class SourceDefect(NamedTuple):
    """`old` stands in `file` exactly once, and becomes `new`."""

    file: str
    """From the repository's root."""
    old: str
    new: str
    cell: str
    """The cell of the matrix that must fail."""


def edited(defect: SourceDefect) -> str:
    """The file with the fault.

    Raises:
        ValueError: the text is not in the file exactly once, so that the defect no longer fits the code.
    """
    text = (ROOT / defect.file).read_text(encoding="utf-8")
    if text.count(defect.old) != 1:
        raise ValueError(f"{defect.file}: holds {defect.old!r} {text.count(defect.old)} times: must be there once to plant a defect")
    return text.replace(defect.old, defect.new)


def plant(defect: SourceDefect, tree: Path) -> None:
    """Fill an empty folder with links to the packages' files, and the file with the fault in its place."""
    text = edited(defect)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            at = tree / path.relative_to(ROOT)
            if "__pycache__" in path.parts or "tests" in path.relative_to(ROOT).parts:
                continue
            if path.is_dir():
                at.mkdir(parents=True, exist_ok=True)
            else:
                at.parent.mkdir(parents=True, exist_ok=True)
                at.symlink_to(path)
    target = tree / defect.file
    target.unlink()
    target.write_text(text, encoding="utf-8")


def folder_name(defect: str) -> str:
    """The folder of a defect's objects: its name in small letters and digits, with hyphens between the words."""
    return re.sub(r"[^a-z0-9]+", "-", defect.lower()).strip("-")


def planted_folders(defect: str) -> list[Path]:
    """Where objects with the defect may lie: a folder of its name in each of ``SONICMOE_KERNELS``."""
    return [Path(folder) / folder_name(defect) for folder in os.environ.get(KERNELS_VARIABLE, "").split(os.pathsep) if folder]


def take_planted_kernels(name: str, defect: SourceDefect) -> None:
    """From now on, this process takes kernels from the defect's folders first, and is not told that those without the fault are stale."""
    folders = [str(folder) for folder in planted_folders(name)]
    os.environ[KERNELS_VARIABLE] = os.pathsep.join([*folders, os.environ.get(KERNELS_VARIABLE, "")])
    reason = f"is stale, {defect.file} changed since it was built"

    def tells(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return reason not in message or any(message.startswith(folder + os.sep) for folder in folders)

    logging.getLogger("cute_runtime").addFilter(tells)


def import_planted(name: str, defect: SourceDefect) -> tempfile.TemporaryDirectory:
    """From now on, this process imports the packages' modules from a planted tree, which lives as long as what is returned, and takes
    their kernels; modules that it has imported before are let go."""
    take_planted_kernels(name, defect)
    folder = tempfile.TemporaryDirectory(prefix="planted-")
    plant(defect, Path(folder.name))
    for module in [module for module in sys.modules if module.partition(".")[0] in PACKAGES]:
        del sys.modules[module]
    sys.path.insert(0, folder.name)
    return folder


def work_with(name: str, defect: SourceDefect, matrix_path: str, profile_name: str, device: str) -> Work:
    """A worker's work with the defect."""
    folder = import_planted(name, defect)
    work = importlib.import_module("testing.matrix.execute").prepare(Path(matrix_path), profile_name, device)

    def planted(cell: str, seed: int) -> dict[str, Any]:
        assert folder.name  # the tree lives as long as its work
        return work(cell, seed)

    return planted
