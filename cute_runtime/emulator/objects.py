"""What the emulator needs on disk, compiled on first use and kept in the cache: a kernel's host stub and PTX, and its own core."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cute_runtime.builder import run_compile_step, tools, writable_folder
from cute_runtime.cache import CACHE_VARIABLE, cache_folder
from cute_runtime.objects import object_name, write_object
from cute_runtime.sources import ARCH, COMPILER, key, sources
from cute_runtime.variant import Variant

_HERE = Path(__file__).parent
_CORE = ("core.c", "alu.c", "memory.c", "lanes.c", "barriers.c", "async.c", "tiles.c", "wgmma.c")
_HEADERS = ("core.h", "opcodes.h")
# More optimisation costs more in compiling than it saves in the tests. Without contraction, add and mul are rounded one by one, as on
# the device; -frounding-math keeps directed rounding.
_FLAGS = ("-O1", "-fPIC", "-shared", "-ffp-contract=off", "-frounding-math")


class Compiled(NamedTuple):
    """The files of one compilation."""

    object: Path
    """What :func:`cute_runtime.build` makes, byte for byte."""
    stub: Path
    """The same host stub, linked with the emulated CUDA runtime."""
    ptx: Path


def compiled(variant: Variant) -> Compiled:
    """A variant's files, compiled where the cache does not have them.

    Raises:
        MissingToolError, KernelCompileError: see :func:`cute_runtime.build`.
    """
    compiler, cuda = tools()[0], _HERE / "cuda.c"
    digests = sources(variant)
    variant_key = key(variant, digests, compiler)

    def files(folder: Path) -> Compiled:
        return Compiled(folder / object_name(variant), folder / "stub.so", folder / "kernel.ptx")

    def make(folder: Path) -> None:
        wanted = files(folder)
        with tempfile.TemporaryDirectory(prefix="cute_runtime.") as scratch:
            extra = {"output": str(wanted.stub), "ptx": str(wanted.ptx), "cuda": str(cuda)}
            shared_object = run_compile_step(variant, Path(scratch), cache_folder() / f"{variant.name}.log", extra)
        facts = {"compiler": f"{COMPILER} {compiler}", "arch": ARCH, "sources": digests}
        write_object(wanted.object, shared_object, variant=variant, key=variant_key, **facts)

    return files(_kept("variant", variant_key + hashlib.sha256(cuda.read_bytes()).hexdigest(), make))


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
