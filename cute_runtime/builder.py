"""Building kernel objects: one in a process of its own, many side by side behind a progress display."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from cute_runtime import host_code
from cute_runtime.objects import FUNCTION, CorruptObjectError, object_name, split_object, write_object
from cute_runtime.sources import ARCH, COMPILER, compiler_version, is_host_code, key, project_packages, sources
from cute_runtime.variant import Variant

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class MissingToolError(RuntimeError):
    """The compiler or a C compiler is not installed; the message says how to get it."""


class KernelCompileError(RuntimeError):
    """A kernel does not compile. The compiler's output is kept in ``log``."""

    def __init__(self, variant: Variant, log: Path) -> None:
        lines = [line.strip() for line in _COLOUR.sub("", log.read_text(errors="replace")).splitlines() if line.strip()]
        # The compiler puts suggestions behind its error; Python's own exceptions come last.
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        super().__init__(f"{variant.name}: does not compile ({errors[-1]}); the log is {log}")
        self.variant = variant
        self.log = log


def build(variant: Variant, out_dir: str | os.PathLike) -> Path:
    """Compile a variant for sm_90a into ``out_dir/<name>.so``. Needs no GPU.

    An object that was built from the same sources by the same compiler is kept. Two builders of one variant do not disturb
    each other: each writes aside, the last rename wins, and both wrote the same thing.

    Raises:
        MissingToolError: nvidia-cutlass-dsl or a C compiler is not installed.
        KernelCompileError: the compiler refuses the kernel; its output is kept as ``out_dir/<name>.log``.
        ValueError: there is no such kernel, or ``out_dir`` cannot be written.
    """
    compiler, _ = tools()
    digests = sources(variant)
    variant_key = key(variant, digests, compiler)
    out_dir = writable_folder(out_dir, "out_dir")
    path = out_dir / object_name(variant)
    if _is_current(path, variant_key):
        return path
    with tempfile.TemporaryDirectory(prefix="cute_runtime.") as scratch:
        compile_step = _run_host_compile_step if is_host_code(variant.kernel) else run_compile_step
        shared_object = compile_step(variant, Path(scratch), out_dir / f"{variant.name}.log")
    facts = {"variant": variant, "key": variant_key, "compiler": f"{COMPILER} {compiler}", "arch": ARCH, "sources": digests}
    try:
        write_object(path, shared_object, **facts)
    except OSError as error:
        raise ValueError(f"out_dir={str(out_dir)!r}: cannot be written ({error.strerror})") from None
    return path


def build_all(
    variants: Iterable[Variant], out_dir: str | os.PathLike, *, jobs: int, on_done: Callable[[Variant, KernelCompileError | None], None]
) -> list[KernelCompileError]:
    """Build many variants, ``jobs`` at a time, and return the failures of those that do not compile.

    ``on_done`` is called in this thread as each one ends. Any other error stops the rest and is raised.
    """
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(build, variant, out_dir): variant for variant in variants}
        try:
            for future in as_completed(running):
                failure = None
                try:
                    future.result()
                except KernelCompileError as error:
                    failure = error
                    failures.append(error)
                on_done(running[future], failure)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def writable_folder(folder: str | os.PathLike, argument: str) -> Path:
    """The folder, made if missing; ValueError naming ``argument`` where it cannot be written."""
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}={str(folder)!r}: cannot be made a folder ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}={str(folder)!r}: must be a writable folder")
    return path


def tools() -> tuple[str, str]:
    """Version of the kernel compiler and path of the C compiler; MissingToolError where one is missing."""
    compiler = compiler_version()
    if compiler is None:
        raise MissingToolError(f'{COMPILER} is not installed: it compiles kernels; get it with pip install "sonicmoe[compile]"')
    name = os.environ.get("CC", "cc")
    cc = shutil.which(name)
    if cc is None:
        raise MissingToolError(f"no C compiler {name!r} on PATH: it links kernels; get one with apt install gcc, or name one in CC")
    return compiler, cc


def _is_current(path: Path, variant_key: str) -> bool:
    try:
        return split_object(path)[0].key == variant_key
    except (FileNotFoundError, CorruptObjectError):
        return False


def _run_host_compile_step(variant: Variant, scratch: Path, log: Path) -> bytes:
    """As run_compile_step for host code, which is the C compiler's alone."""
    _, cc = tools()
    output = scratch / "host.so"
    result = subprocess.run(host_code.command(variant, cc, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        log.write_bytes(result.stdout)
        raise KernelCompileError(variant, log)
    return output.read_bytes()


def run_compile_step(variant: Variant, scratch: Path, log: Path, emulator: Mapping[str, str] | None = None) -> bytes:
    """Run the compile step with everything it writes in ``scratch``; returns the shared object. A failure leaves ``log``.

    ``emulator``: what :mod:`cute_runtime.emulator` wants beside it, see compile_worker.py.
    """
    _, cc = tools()
    output = scratch / "kernel.so"
    request = scratch / "request.json"
    request.write_text(
        json.dumps(
            {
                "kernel": variant.kernel,
                "params": dict(variant.params),
                "arch": ARCH,
                "packages": sorted(project_packages(variant)),
                "cc": cc,
                "output": str(output),
                "function": FUNCTION,
                **({"emulator": dict(emulator)} if emulator else {}),
            }
        )
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    environment = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "CUTE_DSL_DUMP_DIR": str(scratch),
        "CUTE_DSL_CACHE_DIR": str(scratch),
    }
    command = [sys.executable, "-m", "cute_runtime.compile_worker", str(request)]
    result = subprocess.run(command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        log.write_bytes(result.stdout)
        raise KernelCompileError(variant, log)
    return output.read_bytes()
