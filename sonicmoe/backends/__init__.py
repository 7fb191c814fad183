"""What computes the experts: a backend is a module with the six operations of `sonicmoe.backends.reference`."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

import cute_runtime
from dispatch.operators import check_backend, is_hopper

_HOPPER_DTYPES = (torch.bfloat16, torch.float16)
_one_by_one = 0


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: "auto" is "hopper" for bfloat16 and float16 on an sm_90 GPU, else "reference".

    Raises:
        ValueError: no such backend, or "hopper" where it cannot run.
    """
    check_backend(backend)
    if backend == "reference":
        return "reference"
    on_hopper = is_hopper(device)
    if backend == "hopper" and not on_hopper:
        raise ValueError(f'backend="hopper": the tensors are on {device}, must be an sm_90 GPU')
    if backend == "hopper" and dtype not in _HOPPER_DTYPES:
        raise ValueError(f'backend="hopper": the tensors are {dtype}, must be bfloat16 or float16')
    return "hopper" if on_hopper and dtype in _HOPPER_DTYPES else "reference"


@functools.cache
def load(backend: str) -> ModuleType:
    """The module of a resolved backend."""
    return importlib.import_module(f"sonicmoe.backends.{backend}")


def prepare(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Begin in the background what the first call of this backend would wait for, `cute_runtime.prepare`; nothing where no kernel runs.

    Never an error: asked for tensors that exist, of any device, with a GPU or without data.
    """
    if device.type == "cuda" and torch.cuda.is_initialized() and backend != "reference" and dtype in _HOPPER_DTYPES and is_hopper(device):
        cute_runtime.prepare()


def fused_forward(backend: str) -> Callable[..., tuple | None] | None:
    """The whole forward of a backend that has it in one function, `sonicmoe.backends.hopper.forward`, else None."""
    return None if _one_by_one else getattr(load(backend), "forward", None)


def is_one_by_one() -> bool:
    """Whether the caller is inside of `one_by_one`."""
    return _one_by_one > 0


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Every operation is called by itself inside, so that one of them can be timed or replaced."""
    global _one_by_one
    _one_by_one += 1
    try:
        yield
    finally:
        _one_by_one -= 1
