"""Suite ``start``: the first call of a fresh process, and host time per call afterwards.

First call: a child process imports torch and creates the CUDA context; then the import of this library and the first call of the layer
count together, making the layer does not. The library's bytecode is written before, as pip does when it installs: where Python may not
write it (PYTHONDONTWRITEBYTECODE), every process compiles a checkout's modules anew, more than half of the import; how many had none is
recorded. With prebuilt kernels and no compiler: the child gets an empty cache, and where it left an object there or imported the
compiler, not all kernels were prebuilt and there is no such number. With a compile: the prebuilt up-projection is hidden, so that the
first child compiles it into the cache and the next one finds it there.

Host time: see testing/measure/host_time.py.
"""

import compileall
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cute_runtime.cache import CACHE_VARIABLE
from cute_runtime.sources import COMPILER, compiler_version
from sonicmoe.thiek import Thiek
from testing.measure import host_time
from testing.measure.first_call import HIDDEN_KERNEL, PACKAGES
from testing.measure.items import NEEDS_GPU, Bound, Item, NotRunError, Options, cell

ROOT = Path(__file__).absolute().parents[2]
MODES = {"inference": True, "forward": True, "training step": False}
"""Mode of the first call -> whether the bound is stated for it."""
PROCESSES = 3
"""Of each mode; the median counts."""
TIMEOUT_S = 300
PREBUILT_S, COMPILED_S, CACHED_S = 0.2, 20.0, 0.5


def items(options: Options) -> list[Item]:
    thiek, small = options.thiek(4096, 4096, 1024, 128, 8), options.thiek(64, 1024, 512, 64, 8)
    found = []
    for mode in ("training step",) if options.quick else MODES:
        name = f"start/prebuilt/{mode}"
        found.append(Item(name, _prebuilt(options, name, thiek, mode)))
    name = "start/compiled"
    found.append(Item(name, _compiled(options, name, thiek), _no_compile(options)))
    name = "start/host-time"
    return [*found, Item(name, host_time.measured(options, name, small))]


def write_bytecode(root: Path = ROOT) -> None:
    """Beside the library's modules; where the checkout cannot be written nothing happens."""
    for package in PACKAGES:
        compileall.compile_dir(root / package, quiet=2)


def _no_compile(options: Options) -> str:
    """Why no kernel can be compiled here."""
    if options.backend != "hopper":
        return NEEDS_GPU
    return "" if compiler_version() else f"{COMPILER} is not installed"


def first_call(options: Options, thiek: Thiek, mode: str, cache: Path, *, recompile: bool = False) -> dict[str, Any]:
    """What one fresh process measured, and ``start_s``, import and first call together.

    Raises:
        NotRunError: it found a kernel neither prebuilt nor in the cache, and has no compiler or no C compiler.
        RuntimeError: it failed otherwise, or its output was not finite.
    """
    asked = {"device": str(options.device), "backend": options.backend, "thiek": list(thiek), "mode": mode, "recompile": recompile}
    command = [sys.executable, "-m", "testing.measure.first_call", json.dumps(asked)]
    done = run_child(command, TIMEOUT_S, {CACHE_VARIABLE: str(cache)})
    if done.returncode:
        raise failure(done)
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["finite"]:
        raise RuntimeError("the process's output has values that are not finite")
    return {**found, "start_s": (found["import_ms"] + found["first_ms"]) / 1e3}


def run_child(command: list[str], timeout: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that finds this checkout's packages, with more in its environment; what it printed is text."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)


def failure(done: subprocess.CompletedProcess[str]) -> RuntimeError:
    """The error of a process that failed; NotRunError where it found a kernel neither prebuilt nor in the cache and has no compiler."""
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    if any(missing in last for missing in ("MissingKernelError", "MissingToolError")):
        return NotRunError(last.partition(": ")[2].partition(" in ")[0])  # without the folders of this machine
    return RuntimeError(f"the process ended with {done.returncode}: {last}")


@contextmanager
def _cache() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sonicmoe_start.") as folder:
        yield Path(folder)


def _objects(cache: Path) -> list[str]:
    return sorted(path.stem for path in cache.rglob("*.so"))


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0] if key.endswith("_ms") or key == "start_s"}


def _prebuilt(options: Options, name: str, thiek: Thiek, mode: str) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        count, runs = 1 if options.quick else PROCESSES, []
        write_bytecode()
        for _ in range(count):
            with _cache() as cache:
                runs.append(first_call(options, thiek, mode, cache))
                if compiled := _objects(cache):
                    raise NotRunError(f"not prebuilt here and compiled instead: {', '.join(compiled)}")
        if any(run["compiler_imported"] for run in runs):
            raise RuntimeError("the process imported the compiler")
        medians = _medians(runs)
        slowest = max(run["start_s"] for run in runs)
        anew = max(run["modules_without_bytecode"] for run in runs)
        bound = Bound(medians["start_s"], "s to the first result", PREBUILT_S) if MODES[mode] else None
        return [
            cell(
                options,
                name,
                mode="first call",
                bound=bound,
                why=f"{anew} modules had no bytecode" if anew else "",
                thiek=thiek,
                routing="top_k",
                **medians,
                slowest_s=slowest,
                processes=count,
                modules_without_bytecode=anew,
            )
        ]

    return run


def _compiled(options: Options, name: str, thiek: Thiek) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        write_bytecode()
        with _cache() as cache:
            first = first_call(options, thiek, "forward", cache, recompile=True)
            objects = _objects(cache)
            if not any(HIDDEN_KERNEL.rpartition(".")[2] in stem for stem in objects):
                raise RuntimeError(f"the first process did not compile {HIDDEN_KERNEL}")
            count = 1 if options.quick else PROCESSES
            later = [first_call(options, thiek, "forward", cache, recompile=True) for _ in range(count)]
            if _objects(cache) != objects or any(run["compiler_imported"] for run in later):
                raise RuntimeError("a later process compiled again")
        medians, about = _medians(later), {"thiek": thiek, "routing": "top_k"}
        compiled = Bound(first["start_s"], f"s to the first result, {len(objects)} kernels compiled", COMPILED_S)
        cached = Bound(medians["start_s"], "s to the first result, compiled before", CACHED_S)
        return [
            cell(options, f"{name}/first", mode="first call, compiled", bound=compiled, **about, objects=objects, **_medians([first])),
            cell(options, f"{name}/next", mode="first call, cached", bound=cached, **about, **medians, processes=count),
        ]

    return run
