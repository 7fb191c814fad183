"""A function of Python in a kernel's place where launches are called from C (cute_runtime/launches.py), on a CPU."""

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm_ffi


def native(function: Callable[..., None]) -> "tvm_ffi.Function":
    """The function as one of TVM-FFI. It gets torch tensors over the memory that the caller lends it, valid until it returns."""
    import tvm_ffi

    def call(*arguments: Any) -> None:
        function(*(_lent(value) if isinstance(value, tvm_ffi.Tensor) else value for value in arguments))

    return tvm_ffi.convert(call)


def _lent(tensor: Any) -> Any:
    """TVM-FFI's tensor on the CPU, contiguous, which owns nothing and so is not exported through DLPack."""
    import torch

    dtype = getattr(torch, str(tensor.dtype))
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    memory = (ctypes.c_char * (tensor.numel() * dtype.itemsize)).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=dtype).view(tensor.shape)
