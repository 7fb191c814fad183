"""Host memory that claims to be on a CUDA device, which the host stub insists on."""

import ctypes
from typing import Any, NamedTuple

import numpy as np

_CUDA_DEVICE = 2  # DLPack's number of the device type


class Region(NamedTuple):
    """Bytes of global memory that a launch may touch."""

    base: int
    size: int
    name: str

    def marks(self) -> np.ndarray:
        """A number for each of its words of 4 bytes."""
        return np.zeros(self.size // 4 + 2, np.uint32)


class Written(NamedTuple):
    """What a launch has written of a region."""

    region: Region
    marks: np.ndarray


def marks_of(region: Region, history: list[Written]) -> np.ndarray:
    """A region's words, those marked that a launch has written, under whatever name."""
    marks = region.marks()
    for other, written in history:
        shift = (other.base - region.base) // 4  # from the other's words to this region's
        begin, end = max(0, shift), min(len(marks), shift + len(written))
        if begin < end:
            marks[begin:end] |= written[begin - shift : end - shift]
    return marks


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _OnDevice:
    """DLPack's protocol around a host tensor, with the device type changed."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA_DEVICE, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = _exported(self.tensor)
        _described(capsule).device_type = _CUDA_DEVICE
        return capsule


def _described(capsule: Any) -> _DLTensor:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return _DLTensor.from_address(pointer(capsule, b"dltensor"))


def _exported(tensor: Any) -> Any:
    """The tensor's capsule; torch exports no tensor that requires a gradient."""
    return (tensor.detach() if hasattr(tensor, "detach") else tensor).__dlpack__()


def is_tensor(argument: Any) -> bool:
    return hasattr(argument, "__dlpack__")


def as_device_tensor(tensor: Any) -> Any:
    """The tensor for the host stub; it shares the memory."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(_OnDevice(tensor))


def region_of(tensor: Any, name: str) -> Region:
    """The memory from a tensor's first to its last element.

    Raises:
        ValueError: it is not on the CPU.
    """
    capsule = _exported(tensor)
    described = _described(capsule)
    if described.device_type != 1:
        raise ValueError(f"{name}: is on device type {described.device_type}: must be on the CPU")
    shape = described.shape[: described.ndim]
    item = described.bits * described.lanes // 8
    strides = described.strides[: described.ndim] if described.strides else None
    if strides is None:
        strides, step = [], 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= size
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    elements = last + 1 if all(shape) else 0
    text = f"{name} ({tensor.dtype}, shape {tuple(shape)})".replace("torch.", "")
    return Region((described.data or 0) + described.byte_offset, elements * item, text)
