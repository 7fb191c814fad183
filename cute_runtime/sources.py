"""What a kernel is made of: its source files, and the key that changes when the compiled kernel could.

A kernel's sources are its module, the project modules that it imports (found by parsing, nothing is executed) and this package's
compile step; those of host code are its C file and the module that compiles it. Packages' ``__init__.py`` do not count, because the
compile step does not run them: a kernel imports modules by their full path, so that a change elsewhere in its package does not rebuild
it.
"""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import json
import threading
from pathlib import Path

from cute_runtime.variant import Variant

ARCH = "sm_90a"
COMPILER = "nvidia-cutlass-dsl"
PROJECT_PACKAGES = ("cute_runtime", "dispatch", "routing", "sonicmoe", "testing")
"""Packages whose modules a kernel may share; beside these, the kernel's own top-level package counts."""

# Python 3.11's ast.parse counts its recursion in a place that threads share: two at once end in "AST constructor recursion depth
# mismatch" now and then (CPython issue 106905).
_parsing = threading.Lock()

_COMPILE_STEP = ("cute_runtime/compile_worker.py", "cute_runtime/shim.c")
_HOST_COMPILE_STEP = ("cute_runtime/host_code.py",)


def project_packages(variant: Variant) -> set[str]:
    """Top-level packages whose modules are sources of this variant when imported by it."""
    return {*PROJECT_PACKAGES, variant.kernel.partition(".")[0]}


@functools.cache
def package_folder(top_level: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec(top_level)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None


def source_path(name: str) -> Path | None:
    """The file of a source as the manifest names it (``dispatch/kernels/gather_sum.py``), or None where it is not on this machine."""
    top_level, _, rest = name.partition("/")
    folder = package_folder(top_level)
    path = folder / rest if folder else None
    return path if path and path.is_file() else None


def is_host_code(kernel: str) -> bool:
    """Whether a kernel module is a C file, built and loaded like a kernel but without code for a GPU."""
    return source_path(kernel.replace(".", "/") + ".c") is not None


def sources(variant: Variant) -> dict[str, str]:
    """SHA-256 of every source file, by its path from the packages' root.

    Raises:
        ValueError: there is no such kernel module.
    """
    first = variant.kernel.replace(".", "/") + ".py"
    steps = _COMPILE_STEP
    if is_host_code(variant.kernel):
        first, steps = first.removesuffix("py") + "c", _HOST_COMPILE_STEP
    elif source_path(first) is None:
        raise ValueError(f"kernel={variant.kernel!r}: there is no module {first} on the import path")
    packages = project_packages(variant)
    found, waiting = {}, [first, *steps]
    while waiting:
        name = waiting.pop()
        path = source_path(name)
        if name in found or path is None:
            continue
        content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()
        if name not in steps and name.endswith(".py"):
            waiting += [imported for imported in _imports(name, content) if imported.partition("/")[0] in packages]
    return dict(sorted(found.items()))


def changed_sources(recorded: dict[str, str]) -> list[str]:
    """Of sources recorded at build time, those that are on this machine and differ.

    Whatever changes the list of imports changes a recorded file, so this needs no parsing. Where the sources were not
    installed there is nothing to compare and the list is empty.
    """
    changed = []
    for name, digest in recorded.items():
        path = source_path(name)
        if path is not None and _digest(path) != digest:
            changed.append(name)
    return changed


def _digest(path: Path) -> str:
    """SHA-256 of a file, read once a process: the objects of a layer share most of their sources."""
    status = path.stat()
    return _digest_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _digest_of(path: Path, *identity: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compiler_version() -> str | None:
    """Version of the installed compiler, or None. Does not import it."""
    try:
        return importlib.metadata.version(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return None


def key(variant: Variant, digests: dict[str, str], compiler: str) -> str:
    """The name of exactly this compilation: sources, parameters, compiler version and target."""
    identity = {"variant": variant.name, "sources": digests, "compiler": compiler, "arch": ARCH}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _imports(name: str, content: bytes) -> list[str]:
    """Module files that a source might import, as source names; those that do not exist are dropped by the caller."""
    package = name.split("/")[:-1]
    modules = []
    with _parsing:
        tree = ast.parse(content, filename=name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules += [base, *([*base, alias.name] for alias in node.names)]
    return ["/".join(parts) + ".py" for parts in modules]
