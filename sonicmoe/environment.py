"""Where a result was measured: the header of every recorded result."""

import datetime
import importlib.metadata
import platform
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "apache-tvm-ffi", "nvidia-cutlass-dsl", "numpy")


def describe(device: str | None = None) -> dict[str, Any]:
    """The machine and the sources, as JSON values.

    Args:
        device: "cpu" or a CUDA device such as "cuda:0"; None takes the GPU where there is one.

    Returns:
        device (its name), driver and power_limit_w (None without a GPU), versions (package -> version, None where it is not
        installed), commit and dirty (None outside a git checkout of this project), date (UTC, ISO 8601).
    """
    index = _gpu_index(device)
    gpu = {"device": _cpu_name(), "driver": None, "power_limit_w": None} if index is None else _describe_gpu(index)
    return {**gpu, "versions": versions(), **_source_state(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def command(*words: str) -> str:
    """A command line for a recorded result: of absolute paths, which say where things lie on one machine, only the names."""
    return shlex.join(re.sub(r"(?<![^=:])/[^=:]*/", "", word) for word in words)


def versions() -> dict[str, str | None]:
    """Installed versions of Python and of what the numbers depend on; None for what is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _gpu_index(device: str | None) -> int | None:
    import torch

    if device is None:
        return torch.cuda.current_device() if torch.cuda.is_available() else None
    chosen = torch.device(device)
    if chosen.type != "cuda":
        return None
    return torch.cuda.current_device() if chosen.index is None else chosen.index


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _describe_gpu(index: int) -> dict[str, Any]:
    """Driver and power limit come from nvidia-smi, asked for by UUID because it ignores CUDA_VISIBLE_DEVICES."""
    import torch

    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits"]
    driver, power = (_output(query) or ",").strip().split(",")
    try:
        limit = float(power)
    except ValueError:
        limit = None
    return {"device": torch.cuda.get_device_name(index), "driver": driver.strip() or None, "power_limit_w": limit}


def _source_state() -> dict[str, Any]:
    """The commit of the checkout that this file is tracked in; an installed package inside another repository has none."""
    folder = Path(__file__).resolve().parent
    git = ["git", "-C", str(folder)]
    if _output([*git, "ls-files", "--error-unmatch", Path(__file__).name]) is None:
        return {"commit": None, "dirty": None}
    commit, status = _output([*git, "rev-parse", "HEAD"]), _output([*git, "status", "--porcelain", ":/"])
    return {"commit": commit and commit.strip(), "dirty": None if status is None else bool(status.strip())}


def _output(command: list[str]) -> str | None:
    """Standard output, or None where the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
