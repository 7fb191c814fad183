"""What the emulator needs on disk: a kernel's host stub and PTX, and its own core; compiled on first use and kept in the cache."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from cute_runtime.build import run_compile_step, tools, writable_folder
from cute_runtime.cache import CACHE_VARIABLE, cache_folder
from cute_runtime.sources import key, sources
from cute_runtime.variant import Variant

_HERE = Path(__file__).parent
_CORE = ("core.c", "alu.c", "memory.c", "lanes.c", "barriers.c", "async.c", "tiles.c", "wgmma.c")
_HEADERS = ("core.h", "opcodes.h")
# Without contraction: add and mul are rounded one by one, as on the device. With -frounding-math, directed rounding is respected.
_FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-frounding-math")


def kernel_files(variant: Variant) -> tuple[Path, Path]:
    """The shared object of a kernel's host stub, linked with the emulated CUDA runtime, and its PTX.

    Raises:
        MissingToolError, KernelCompileError: see :func:`cute_runtime.build`.
    """
    cuda = _HERE / "cuda.c"
    identity = key(variant, sources(variant), tools()[0]) + hashlib.sha256(cuda.read_bytes()).hexdigest()

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="cute_runtime.") as scratch:
            wanted = {"output": str(folder / "kernel.so"), "ptx": str(folder / "kernel.ptx"), "cuda": str(cuda)}
            run_compile_step(variant, Path(scratch), cache_folder() / f"{variant.name}.log", wanted)

    folder = _kept("kernel", identity, make)
    return folder / "kernel.so", folder / "kernel.ptx"


def core_file() -> Path:
    """The shared object of the core. MissingToolError where there is no C compiler."""
    cc = tools()[1]
    content = b"".join((_HERE / name).read_bytes() for name in (*_CORE, *_HEADERS))

    def make(folder: Path) -> None:
        command = [cc, *_FLAGS, "-o", str(folder / "core.so"), *(str(_HERE / name) for name in _CORE), "-lm"]
        subprocess.run(command, check=True)

    return _kept("core", hashlib.sha256(content + " ".join((cc, *_FLAGS)).encode()).hexdigest(), make) / "core.so"


def _kept(kind: str, identity: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of this identity, filled by ``make`` aside and moved into place, by one process at a time."""
    parent = writable_folder(cache_folder(), CACHE_VARIABLE)
    folder = parent / f"emulator-{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    if folder.is_dir():
        return folder
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=parent, prefix=".emulator.") as aside:
                filled = Path(aside) / "filled"
                filled.mkdir()
                make(filled)
                os.replace(filled, folder)
    return folder
