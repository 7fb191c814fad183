"""Kernels compiled on first use, kept on disk.

``$SONICMOE_CACHE``, else ``$XDG_CACHE_HOME/sonicmoe/kernels``, else ``~/.cache/sonicmoe/kernels``. One folder per key, so that a
change of sources, parameters or compiler is a miss and never a wrong hit.
"""

import fcntl
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cute_runtime.objects import CorruptObjectError, object_name, split_object
from cute_runtime.sources import compiler_version, key, sources
from cute_runtime.variant import Variant

CACHE_VARIABLE = "SONICMOE_CACHE"
NOT_USED = "%s; it is not used"
"""The warning about a prebuilt object."""

_log = logging.getLogger("cute_runtime")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sonicmoe" / "kernels"


def cached_or_built(variant: Variant, passed_over: Sequence[str] = ()) -> Path:
    """The object of a variant from the cache, compiled into it first where it is missing.

    Processes that want the same kernel at once wait for the first of them. A file that is cut short or altered counts as
    missing and says so.

    Args:
        passed_over: why each prebuilt object will not do; said only where the kernel is compiled for it, which is once.

    Raises:
        MissingToolError, KernelCompileError: see :func:`cute_runtime.build`.
        ValueError: the cache cannot be written.
    """
    from cute_runtime.builder import build, writable_folder  # only where nothing is prebuilt

    variant_key = key(variant, sources(variant), compiler_version() or "none")
    folder = writable_folder(cache_folder() / variant_key, CACHE_VARIABLE)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / object_name(variant)
        try:
            split_object(path)
        except FileNotFoundError:
            pass
        except CorruptObjectError as error:
            _log.warning("%s; it is compiled anew", error)
        else:
            return path
        for reason in passed_over:
            _log.warning(NOT_USED, reason)
        _log.info("%s: compiling for the first time, kept in %s", variant.name, folder)
        return build(variant, folder)
