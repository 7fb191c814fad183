"""Several launches as one call: host half of kernels/launches.c.

A call from Python of a function of TVM-FFI costs several microseconds, and so does each view of a tensor that only says where in another
one something lies. A list of launches is called once, with the tensors that were really allocated; what lies in them is said when the
list is made, in bytes. docs/kernels/layer.md has the times.

    scratch = Parts("scratch")
    scratch.add("twice", torch.float32, 64)
    launch = one_call(
        {"x": Given(torch.float32, (64,)), "scratch": scratch.given(torch.float32), "out": Given(torch.float32, (64,))},
        scratch,
        [(add, ("x", "x", "twice")), (scale, ("twice", 0.5, "out"))],
    )
    launch(x, x.new_empty(*scratch.shape(torch.float32)), out)
"""

import functools
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from cute_runtime.load import load
from cute_runtime.variant import Variant

if TYPE_CHECKING:
    import torch

LAUNCHES = Variant("cute_runtime.kernels.launches")

NOTHING, TENSOR, INTEGER, REAL = range(4)
"""Kinds of an argument, as launches.c has them."""

_APART = 256
"""Bytes: where a part begins is a multiple of these unless it follows another closely, so that it is aligned as if allocated."""


class Given(NamedTuple):
    """A tensor that a list is called with: contiguous, its data at a multiple of ``alignment`` bytes."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]
    alignment: int = 16


class Part(NamedTuple):
    """Where in a given tensor another one begins, in bytes, and what it is."""

    offset: int
    dtype: "torch.dtype"
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Parts:
    """The parts of one given tensor, one behind the other."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = 0
        self.parts: dict[str, Part] = {}

    def add(self, name: str, dtype: "torch.dtype", *shape: int, apart: bool = True) -> None:
        """One more part; ``apart=False`` puts it right behind the last one."""
        begin = -(-self.bytes // _APART) * _APART if apart else self.bytes
        self.parts[name] = part = Part(begin, dtype, shape)
        self.bytes = begin + part.bytes

    def add_over(self, name: str, other: str, dtype: "torch.dtype", *shape: int) -> None:
        """A part that begins where another does, for what the other one's content is not needed any more; it may reach further."""
        self.parts[name] = part = Part(self.parts[other].offset, dtype, shape)
        self.bytes = max(self.bytes, part.offset + part.bytes)

    def shape(self, dtype: "torch.dtype") -> tuple[int]:
        """Of the tensor of this dtype that holds the parts."""
        return (-(-self.bytes // dtype.itemsize),)

    def given(self, dtype: "torch.dtype") -> Given:
        return Given(dtype, self.shape(dtype))


Argument = str | int | float | None
"""Of a launch: a tensor's name, a number, or None."""


def one_call(
    given: Mapping[str, Given | None], parts: Iterable[Parts], calls: Iterable[tuple[Callable[..., None], tuple[Argument, ...]]]
) -> Callable:
    """A function that takes the given tensors in their order and calls the functions one after the other, on the current stream.

    Args:
        given: the tensors of a call, by name. None: there is none, which a call then says by None, and so do the functions' arguments
            of this name; not the first one.
        parts: of given tensors, which they name; parts' names are tensors' names too.
        calls: functions that `cute_runtime.load` returned, and the arguments of each.

    Returns:
        The function. It returns None, or the number of the first tensor that is not as ``given`` has it (dtype, shape, strides,
        alignment, or another device than the first one): then it has called nothing. An error of one of the functions is raised as it
        is, and none behind it is called.

    Raises:
        MissingKernelError, MissingToolError, KernelCompileError: as `cute_runtime.load` of a kernel.
    """
    import torch

    parts = tuple(parts)
    names = [*given, *itertools.chain.from_iterable(one.parts for one in parts)]
    number = {name: index for index, name in enumerate(names)}
    if len(number) != len(names):
        raise ValueError(f"launches: tensors {', '.join(names)}: must have names of their own")
    calls = tuple(calls)
    words = [len(given), len(names) - len(given), len(calls)]
    for one in given.values():
        words += [0, 1, 0, 0, -1] if one is None else [0, one.alignment, *_layout(one.dtype, one.shape)]
    for one in parts:
        for offset, dtype, shape in one.parts.values():
            words += [number[one.name], offset, *_layout(dtype, shape)]
    for index, (_, arguments) in enumerate(calls):
        words += [index, len(arguments)]
        for argument in arguments:
            words += _argument(argument, number)
    # What stands in for a kernel, a function of Python, brings with it what C can call: cute_runtime.emulator.native.
    functions = [getattr(function, "native", function) for function, _ in calls]
    return load(LAUNCHES)(torch.tensor(words, dtype=torch.int64, device="cpu"), *functions)


def _layout(dtype: "torch.dtype", shape: tuple[int, ...]) -> list[int]:
    strides = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
    return [*_dlpack_codes()[dtype], len(shape), *shape, *strides]


@functools.cache
def _dlpack_codes() -> dict["torch.dtype", tuple[int, int]]:
    """DLPack's code and bits of the dtypes that kernels take."""
    import torch

    return {torch.int32: (0, 32), torch.int64: (0, 64), torch.float16: (2, 16), torch.float32: (2, 32), torch.bfloat16: (4, 16)}


def _argument(argument: Argument, number: Mapping[str, int]) -> tuple[int, int]:
    if argument is None:
        return NOTHING, 0
    if isinstance(argument, str):
        return TENSOR, number[argument]
    if isinstance(argument, float):
        return REAL, struct.unpack("q", struct.pack("d", argument))[0]
    return INTEGER, int(argument)
