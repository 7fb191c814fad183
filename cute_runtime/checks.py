"""What must hold before a launch, each refused in one sentence that names the argument, its value and what is allowed."""

import contextlib
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

BACKENDS = ("auto", "hopper", "reference")
"""Who computes what has a kernel: the kernels ("hopper"), PyTorch ("reference"), or the kernels where they can ("auto")."""

INT32_ELEMENTS = 2**31 - 1
"""Elements that an int32 index reaches."""

_AS_IT_IS = contextlib.nullcontext()


@functools.cache
def is_supported_device(device: "torch.device") -> bool:
    """Whether the device runs the kernels: a CUDA GPU of compute capability 9.0 (sm_90)."""
    import torch

    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def check_launch(*, alignment: int = 16, max_elements: int | None = None, **tensors: "torch.Tensor | None") -> None:
    """Refuse tensors that a kernel cannot take as they are. None among them is skipped.

    Args:
        alignment: bytes that the data pointers must be a multiple of.
        max_elements: most elements that one tensor may have, for kernels that index with int32 (``INT32_ELEMENTS``).
        **tensors: the arguments under the names that the messages use; the first one's device is everyone's device.

    Raises:
        ValueError: a tensor is not on an sm_90 GPU or not on the first one's device, is not contiguous, not aligned or too large.
    """
    if max_elements is None and _all_fit(alignment, tensors.values()):
        return
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        device = tensor.device
        if first is None:
            first = name, device
            if not is_supported_device(device):
                raise ValueError(f"{name}: device {_describe(device)}: must be a GPU of compute capability 9.0 (sm_90)")
        elif device != first[1]:
            raise ValueError(f"{name}: device {device}: must be {first[0]}'s device {first[1]}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} with strides {tensor.stride()}: must be contiguous")
        if tensor.data_ptr() % alignment:
            raise ValueError(f"{name}: data pointer {tensor.data_ptr():#x}: must be a multiple of {alignment} bytes")
        if max_elements is not None and tensor.numel() > max_elements:
            raise ValueError(f"{name}: {tensor.numel()} elements: must be at most {max_elements}")


def _all_fit(alignment: int, tensors: "Iterable[torch.Tensor | None]") -> bool:
    """The same conditions without saying which one fails: a microsecond for the usual case, before every launch."""
    first, pointers = None, 0
    for tensor in tensors:
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
            if not is_supported_device(first):
                return False
        elif tensor.device != first:
            return False
        if not tensor.is_contiguous():
            return False
        pointers |= tensor.data_ptr()
    return not pointers % alignment


def on_device(device: "torch.device") -> contextlib.AbstractContextManager:
    """A context in which ``device`` is CUDA's current one. Where it is already, as nearly always, entering it costs next to nothing."""
    index = device.index
    return _AS_IT_IS if index is not None and _current_device()() == index else _switched(device)


@functools.cache
def _current_device() -> "Callable[[], int]":
    """The query of the current device's index; torch.cuda.current_device asks first whether CUDA is initialized, which a tensor proves."""
    import torch

    return torch._C._cuda_getDevice


def _switched(device: "torch.device") -> contextlib.AbstractContextManager:
    import torch

    return torch.cuda.device(device)


def _describe(device: "torch.device") -> str:
    if device.type != "cuda":
        return str(device)
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, compute capability {major}.{minor})"
