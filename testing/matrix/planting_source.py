"""How a defect is planted in a kernel: one text in one source file is replaced, in a tree of its own that a worker imports instead.

What follows is what follows of any change to a kernel: its prebuilt object is stale and passed over, and the kernel with the fault is
compiled, and kept, under the key of its own sources. Kernels whose sources are untouched load as ever.
"""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

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


def work_with(defect: SourceDefect, matrix_path: str, profile_name: str, device: str) -> Work:
    """A worker's work with the defect, from modules of a planted tree; those that the process has imported before are let go."""
    folder = tempfile.TemporaryDirectory(prefix="planted-")
    plant(defect, Path(folder.name))
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.path.insert(0, folder.name)
    work = importlib.import_module("testing.matrix.execute").prepare(Path(matrix_path), profile_name, device)

    def planted(name: str, seed: int) -> dict[str, Any]:
        assert folder.name  # the tree lives as long as its work
        return work(name, seed)

    return planted
