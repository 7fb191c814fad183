"""What computes the experts: a backend is a module with the six operations of `sonicmoe.backends.reference`."""

import importlib
import importlib.util
from types import ModuleType

import torch

BACKENDS = ("auto", "hopper", "reference")
_HOPPER_EXISTS = importlib.util.find_spec("sonicmoe.backends.hopper") is not None


def check_name(backend: str) -> None:
    """Raise ValueError where no machine could run ``backend``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    if backend == "hopper" and not _HOPPER_EXISTS:
        raise ValueError('backend="hopper": this version has no Hopper kernels yet, must be "auto" or "reference"')


def resolve(backend: str, device: torch.device) -> str:
    """The backend that runs: "auto" is "hopper" on an sm_90 GPU where its kernels exist, else "reference".

    Raises:
        ValueError: no such backend, or "hopper" where it cannot run.
    """
    check_name(backend)
    if backend == "reference" or not _HOPPER_EXISTS:
        return "reference"
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if backend == "hopper" and not is_hopper:
        raise ValueError(f'backend="hopper": the tensors are on {device}, must be an sm_90 GPU')
    return "hopper" if is_hopper else "reference"


def load(backend: str) -> ModuleType:
    """The module of a resolved backend."""
    return importlib.import_module(f"sonicmoe.backends.{backend}")
