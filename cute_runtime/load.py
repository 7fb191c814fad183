"""From a variant to a function that launches it: prebuilt, cached, or compiled on first use."""

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from cute_runtime.cache import NOT_USED, cache_folder, cached_or_built
from cute_runtime.discover import KERNELS_VARIABLE, prebuilt_folders
from cute_runtime.objects import FUNCTION, CorruptObjectError, object_name, split_object
from cute_runtime.sources import COMPILER, changed_sources, compiler_version, is_host_code
from cute_runtime.variant import Variant

_log = logging.getLogger("cute_runtime")
_loaded: dict[Variant, Callable[..., None]] = {}
_lock = threading.Lock()


class MissingKernelError(RuntimeError):
    """No object of the variant was found and none can be compiled here; the message says what to do."""


def load(variant: Variant) -> Callable[..., None]:
    """The function that launches a variant on the caller's current CUDA stream; loaded once per process.

    Looked for as a prebuilt object (:func:`cute_runtime.discover.prebuilt_folders`), then in the cache on disk, then compiled
    where the compiler is installed. A prebuilt object whose sources have changed since, or which is damaged, is passed over,
    with a warning where that costs a compilation. The function takes torch tensors and numbers as the kernel's ``trace``
    declares them, without the stream, and raises TypeError or ValueError where dtype, rank, shape, alignment or device differ
    from that.

    Raises:
        MissingKernelError: there is no usable object and no compiler.
        MissingToolError, KernelCompileError: see :func:`cute_runtime.build`.
        RuntimeError: torch on this machine has no CUDA.
    """
    function = _loaded.get(variant)
    if function is None:
        with _lock:
            function = _loaded.get(variant)
            if function is None:
                function = _loaded[variant] = _open(find(variant), gpu=not is_host_code(variant.kernel))
    return function


def find(variant: Variant) -> Path:
    """The object that :func:`load` opens, compiled into the cache where there is no other."""
    passed_over = []
    folders = prebuilt_folders(variant.kernel)
    for folder in folders:
        path = folder / object_name(variant)
        try:
            manifest, _ = split_object(path)
        except FileNotFoundError:
            continue
        except CorruptObjectError as error:
            passed_over.append(str(error))
            continue
        if manifest.variant != variant.name:
            passed_over.append(f"{path}: holds {manifest.variant}")
        elif changed := changed_sources(manifest.sources):
            passed_over.append(f"{path}: is stale, {', '.join(changed)} changed since it was built")
        else:
            return path
    if compiler_version() is None:
        for reason in passed_over:
            _log.warning(NOT_USED, reason)
        searched = ", ".join(map(str, folders))
        raise MissingKernelError(
            f"{variant.name}: no usable prebuilt object in {searched}, and {COMPILER} is not installed to compile it for "
            f'{cache_folder()}: pip install "sonicmoe[compile]", or put an object from python -m cute_runtime build '
            f"--variant {variant.name} --out DIR into a folder named by {KERNELS_VARIABLE}"
        )
    return cached_or_built(variant, passed_over)


@functools.cache
def prepare() -> None:
    """Begin, in a thread and once per process, what the first :func:`load` has to wait for: the import of tvm_ffi, 20 to 50 ms of Python.

    It overlaps with what runs outside of Python: making or reading a layer's weights. load waits for the import's lock where it comes too
    early. For processes that use a GPU; what is missing is for load to say.
    """
    threading.Thread(target=_prepare, name="cute_runtime.prepare").start()


def _prepare() -> None:
    with contextlib.suppress(ImportError, RuntimeError, AssertionError, OSError):  # AssertionError: a torch without CUDA
        _share_tvm_ffi()
        _share_cuda_runtime()


def _open(path: Path, *, gpu: bool) -> Callable[..., None]:
    if gpu:
        _share_cuda_runtime()
    _share_tvm_ffi()
    import tvm_ffi

    return tvm_ffi.load_module(str(path))[FUNCTION]


@functools.cache
def _share_tvm_ffi() -> None:
    """Objects name functions of libtvm_ffi; make this process's own copy visible to them."""
    import tvm_ffi

    ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi(), ctypes.RTLD_GLOBAL)


@functools.cache
def _share_cuda_runtime() -> None:
    """The same for libcudart, which kernel objects name besides."""
    import torch

    torch.cuda.init()
    libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line]
    if not libraries:
        raise RuntimeError(f"torch {torch.__version__} has not loaded libcudart: kernels need a torch built with CUDA")
    ctypes.CDLL(libraries[0], ctypes.RTLD_GLOBAL)
