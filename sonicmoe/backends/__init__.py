"""What computes the experts: a backend is a module with the six operations of `sonicmoe.backends.reference`."""

import importlib
from types import ModuleType

import torch

from dispatch.operators import check_backend

_HOPPER_DTYPES = (torch.bfloat16, torch.float16)


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: "auto" is "hopper" for bfloat16 and float16 on an sm_90 GPU, else "reference".

    Raises:
        ValueError: no such backend, or "hopper" where it cannot run.
    """
    check_backend(backend)
    if backend == "reference":
        return "reference"
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if backend == "hopper" and not on_hopper:
        raise ValueError(f'backend="hopper": the tensors are on {device}, must be an sm_90 GPU')
    if backend == "hopper" and dtype not in _HOPPER_DTYPES:
        raise ValueError(f'backend="hopper": the tensors are {dtype}, must be bfloat16 or float16')
    return "hopper" if on_hopper and dtype in _HOPPER_DTYPES else "reference"


def load(backend: str) -> ModuleType:
    """The module of a resolved backend."""
    return importlib.import_module(f"sonicmoe.backends.{backend}")
