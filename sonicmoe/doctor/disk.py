"""Free disk against what installing the packages and running the full matrix needs."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sonicmoe.doctor.findings import FAIL, OK, Finding
from sonicmoe.doctor.machine import Machine

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """A folder, what goes there, how much of it and why, and the variable that moves it elsewhere, empty for a virtual environment."""

    what: str
    folder: Path
    gib: float
    why: str
    move: str


def needs(machine: Machine) -> list[Need]:
    """What a full matrix still has to write: less where a torch is installed already."""
    environ = machine.environ
    home_cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home()) / ".cache")
    kernels = Path(environ.get("SONICMOE_CACHE") or home_cache / "sonicmoe" / "kernels")
    pip = Path(environ.get("PIP_CACHE_DIR") or home_cache / "pip")
    temporary = Path(environ.get("TMPDIR") or environ.get("TEMP") or environ.get("TMP") or "/tmp")
    installed = any(metadata.distributions(name="torch", **_search(machine)))
    wheels = "torch for CUDA and its libraries are 3 GiB of wheels"
    packages = [] if installed else [Need("packages", machine.site_packages, 8, "the same unpacked, and the compiler", "")]
    return [
        *packages,
        Need("compiled kernels", kernels, 1, "some 1000 kernels of up to 0.5 MiB and those of older sources", "SONICMOE_CACHE"),
        Need("pip's cache", pip, 0.5 if installed else 4, "torch is installed, updates only" if installed else wheels, "PIP_CACHE_DIR"),
        Need(
            "temporary files",
            temporary,
            2 if installed else 4,
            "intermediate files of compiles side by side, reports, results" if installed else f"{wheels}, unpacked from here",
            "TMPDIR",
        ),
    ]


def check_disk(machine: Machine) -> Iterator[Finding]:
    """Folders on one file system share its free space, so that their needs are added up."""
    groups: dict[int, list[Need]] = {}
    places: dict[str, Path] = {}
    for need in needs(machine):
        place = _existing(need.folder)
        if not place.is_dir() or not os.access(place, os.W_OK):
            message = f"{need.what}: {need.folder} cannot be written, {place} is {'read-only' if place.is_dir() else 'not a folder'}"
            remedy = (
                f"export {need.move}=/a/folder/that/can/be/written" if need.move else "make a virtual environment: python -m venv .venv"
            )
            yield Finding("disk", FAIL, message, remedy)
            continue
        places[need.what] = place
        groups.setdefault(place.stat().st_dev, []).append(need)
    for group in groups.values():
        free = machine.disk_usage(places[group[0].what])[2] / _GIB
        wanted = sum(need.gib for need in group)
        parts = "; ".join(f"{need.what} in {need.folder} {need.gib:g} GiB: {need.why}" for need in group)
        message = f"{free:.1f} GiB free, a full matrix needs {wanted:g} GiB ({parts})"
        if free >= wanted:
            yield Finding("disk", OK, message)
        else:
            moves = [f"set {', '.join(variables)} to folders"] if (variables := [need.move for need in group if need.move]) else []
            moves += ["make the virtual environment"] if any(not need.move for need in group) else []
            remedy = f"free {wanted - free:.1f} GiB (python -m pip cache purge), or {' and '.join(moves)} on a larger disk"
            yield Finding("disk", FAIL, message, remedy)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists: where it would be made."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _search(machine: Machine) -> dict[str, list[str]]:
    return {} if machine.metadata_path is None else {"path": machine.metadata_path}
