"""Where the checks get their facts; every source can be replaced, so that a broken machine can be fabricated."""

import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sonicmoe.doctor.findings import UnavailableError, one_line
from sonicmoe.doctor.gpus import Driver, read_driver

PROBE_TIMEOUT_S = 300
"""An import takes seconds; compiling a kernel on a busy machine under a minute. Anything longer hangs."""


def run_probe(name: str) -> dict[str, Any]:
    """The answer of ``python -m sonicmoe.doctor.probe NAME``, in a process of its own: what is broken may crash or hang there."""
    command = [sys.executable, "-m", "sonicmoe.doctor.probe", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_TIMEOUT_S} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        pass
    if done.returncode < 0:
        return {"error": f"crashed with {signal.Signals(-done.returncode).name}"}
    return {"error": one_line(done.stderr) if done.stderr.strip() else f"exit code {done.returncode} without an answer"}


@dataclass(frozen=True)
class Machine:
    """This machine, or one fabricated by a test.

    Attributes:
        import_module: imports a module of this process by name.
        metadata_path: folders with the installed packages' ``.dist-info``; None is the import path.
        disk_usage: (total, used, free) bytes at a path.
        probe: see :func:`run_probe`.
        site_packages: where pip installs packages.
        proc: the process file system.
        gpu_nodes: prefix of the device files that a process with a CUDA context holds open.
        environ: environment variables.
        kill, sleep: for ``--free-gpu``.
    """

    import_module: Callable[[str], ModuleType] = importlib.import_module
    metadata_path: list[str] | None = None
    disk_usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
    probe: Callable[[str], dict[str, Any]] = run_probe
    site_packages: Path = field(default_factory=lambda: Path(sysconfig.get_path("purelib")))
    proc: Path = Path("/proc")
    gpu_nodes: str = "/dev/nvidia"
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    kill: Callable[[int, int], None] = os.kill
    sleep: Callable[[float], None] = time.sleep

    @functools.cached_property
    def _driver_or_error(self) -> Driver | UnavailableError:
        try:
            return read_driver(self.import_module, self.environ)
        except UnavailableError as error:
            return error

    @property
    def driver(self) -> Driver:
        """The driver and the visible GPUs, read once; UnavailableError where NVML, the driver or its kernel module is missing."""
        if isinstance(self._driver_or_error, UnavailableError):
            raise self._driver_or_error
        return self._driver_or_error

    @functools.cached_property
    def _probes(self) -> dict[str, dict[str, Any]]:
        return {}

    def ask(self, name: str) -> dict[str, Any]:
        """The answer of a probe, asked once."""
        if name not in self._probes:
            self._probes[name] = self.probe(name)
        return self._probes[name]
