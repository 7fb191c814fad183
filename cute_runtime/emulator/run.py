"""Runs kernels: the real host stub up to its launches, each launch by the core; or a kernel written in PTX."""

import ctypes
import functools
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cute_runtime.emulator.lower import lower
from cute_runtime.emulator.objects import compiled, core_file
from cute_runtime.emulator.program import Program
from cute_runtime.emulator.ptx import PTXError, parse
from cute_runtime.emulator.tensors import Region, Written, as_device_tensor, is_tensor, marks_of, region_of
from cute_runtime.objects import FUNCTION
from cute_runtime.variant import Variant

MESSAGE_BYTES = 1 << 16
MOST_THREADS, MOST_SHARED_BYTES = 1024, 227 * 1024
"""Of a block on sm_90."""

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
"""In each direction of a grid."""

STEPS = 2_000_000_000
"""A launch that takes more instructions than this is taken to run for ever."""


# The core has one state, and a host stub one place for the callback.
_running = threading.Lock()
_capturing = threading.Lock()


class EmulationError(RuntimeError):
    """A launch went wrong: a race, a deadlock, an address outside the tensors, an instruction misused. The message says where."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one launch did. Bytes of shared memory and of global loads and stores are those that lanes asked for."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    instructions: int
    """Of a warp: 32 lanes in step count one."""
    products: int
    """Multiply-adds of wgmma."""
    bytes_loaded: int
    """By TMA into shared memory, once for a multicast."""
    bytes_stored: int
    """By TMA out of shared memory."""
    bytes_copied: int
    """By cp.async."""
    global_read: int
    global_written: int
    shared_read: int
    shared_written: int
    barrier_waits: int
    warp_instructions: tuple[int, ...]
    """By the warp's number in its block, summed over blocks: with warps of different roles, instructions by role."""


class Captured(NamedTuple):
    """A launch as the host stub asked for it."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_bytes: int
    overlaps: bool
    """Whether it may start before the launch before it has ended."""
    params: bytes


class _Launch(ctypes.Structure):
    """core.h's struct launch."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("code", "args", "touched", "constants", "params", "regions", "specials")]
        + [("seed", ctypes.c_uint64), ("limit", ctypes.c_uint64)]
        + [
            (name, ctypes.c_int32)
            for name in (
                *("code_count", "constant_bytes", "register_bytes", "param_bytes", "region_count", "static_bytes"),
                *("dynamic_bytes", "local_bytes", "resident", "check_races", "overlaps"),
            )
        ]
        + [(name, ctypes.c_int32 * 3) for name in ("grid", "block", "cluster")]
    )


_COUNTERS = (
    *("instructions", "products", "bytes_loaded", "bytes_stored", "bytes_copied", "global_read", "global_written", "shared_read"),
    *("shared_written", "barrier_waits"),
)


def launch(
    variant: Variant,
    *arguments: Any,
    seed: int = 0,
    resident: int = 4,
    check_races: bool = True,
    edit: Callable[[str], str] | None = None,
    history: list[Written] | None = None,
) -> list[Statistics]:
    """Runs a variant's host stub and all that it launches, in order; outputs are in the tensors given.

    Args:
        variant: as for :func:`cute_runtime.load`.
        arguments: those of the kernel's function, in its order: CPU torch tensors or numpy arrays for its device tensors, numbers, None.
        seed: decides the order in which warps run and the moments at which asynchronous work completes.
        resident: clusters that run at the same time.
        check_races: whether unordered accesses to shared memory are errors. Without, they show in values, with some seeds.
        edit: changes the PTX first; for planting defects.
        history: what the launches before on the same stream have written that a dependent launch must wait for; this one's take its place.

    Returns:
        One Statistics a launch.

    Raises:
        EmulationError: something that must not happen happened.
        PTXError: the kernel has an instruction that is not emulated.
        TypeError, ValueError: the host stub refuses an argument.
        MissingToolError, KernelCompileError: see :func:`cute_runtime.build`.
    """
    files = compiled(variant)
    text = files.ptx.read_text()
    text = edit(text) if edit else text
    programs = _programs(text)
    regions, passed = [], []
    for number, argument in enumerate(arguments):
        if is_tensor(argument):
            regions.append(region_of(argument, f"argument {number}"))
            argument = as_device_tensor(argument)
        passed.append(argument)
    captured = _capture(files.stub, programs, passed)
    history = [] if history is None else history
    statistics = []
    for one in captured:
        if not one.overlaps:
            history.clear()  # it starts when all before it have ended
        before, written = [marks_of(region, history) for region in regions], [region.marks() for region in regions]
        statistics.append(_run(programs[one.kernel], text, one, regions, before, written, seed, resident, check_races))
        history += map(Written, regions, written)
    return statistics


def run_ptx(
    text: str,
    *arguments: Any,
    grid: Sequence[int] = (1,),
    block: Sequence[int] = (32,),
    cluster: Sequence[int] = (1,),
    dynamic_bytes: int = 0,
    seed: int = 0,
    resident: int = 4,
    check_races: bool = True,
    history: list[Written] | None = None,
) -> Statistics:
    """Runs the one kernel of a PTX text, with ``history`` as a dependent launch, see :func:`launch`. A tensor becomes the address of its
    data, ``bytes`` (a tensor map) themselves, a number what its parameter holds.

    Raises:
        EmulationError, PTXError: see :func:`launch`.
    """
    programs = _programs(text)
    (program,) = programs.values()
    params = bytearray(program.param_bytes)
    regions = []
    for number, (argument, param) in enumerate(zip(arguments, program.kernel.params, strict=True)):
        value = argument
        if is_tensor(argument):
            regions.append(region_of(argument, f"argument {number}"))
            value = regions[-1].base
        if isinstance(value, float):
            value = int.from_bytes(np.float32(value).tobytes(), "little")
        raw = value if isinstance(value, bytes) else int(value).to_bytes(param.size, "little", signed=value < 0)
        at = program.param_offsets[param.name]
        params[at : at + len(raw)] = raw
    sizes = [tuple([*shape, 1, 1][:3]) for shape in (grid, block, cluster)]
    captured = Captured(program.kernel.name, *sizes, dynamic_bytes, history is not None, bytes(params))
    before, written = [marks_of(region, history or []) for region in regions], [region.marks() for region in regions]
    return _run(program, text, captured, regions, before, written, seed, resident, check_races)


@functools.cache
def _core() -> ctypes.CDLL:
    core = ctypes.CDLL(str(core_file()))
    core.emulator_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]
    return core


def _names(table: str) -> dict[str, int]:
    entries = (ctypes.c_char_p * 1024).in_dll(_core(), table)
    names: dict[str, int] = {}
    while entries[len(names)] is not None:
        names[entries[len(names)].decode()] = len(names)
    return names


@functools.lru_cache(maxsize=64)
def _programs(text: str) -> dict[str, Program]:
    opcodes, types = _names("emulator_opcodes"), _names("emulator_types")
    return {name: lower(kernel, opcodes, types) for name, kernel in parse(text).items()}


_CALLBACK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    *[ctypes.POINTER(ctypes.c_uint32 * 3)] * 3,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
)


@functools.cache
def _load_stub(path: Path) -> tuple[Callable[..., None], ctypes.CDLL]:
    """The host stub's function, and the emulated CUDA runtime that is linked into the same file."""
    import tvm_ffi

    ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi(), ctypes.RTLD_GLOBAL)
    cuda = ctypes.CDLL(str(path))
    cuda.emulator_unsupported_call.restype = ctypes.c_char_p
    return tvm_ffi.load_module(str(path))[FUNCTION], cuda


def _capture(stub: Path, programs: dict[str, Program], arguments: list[Any]) -> list[Captured]:
    """Calls the host stub; what it launches is noted with the bytes of its parameters."""
    function, cuda = _load_stub(stub)
    captured: list[Captured] = []
    unknown: list[str] = []

    def on_launch(name, grid, block, cluster, dynamic_bytes, overlaps, pointers) -> None:
        if name.decode() not in programs:
            unknown.append(name.decode())
            return
        program = programs[name.decode()]
        params = bytearray(program.param_bytes)
        for number, param in enumerate(program.kernel.params):
            at = program.param_offsets[param.name]
            params[at : at + param.size] = ctypes.string_at(pointers[number], param.size)
        shapes = [tuple(shape.contents) for shape in (grid, block, cluster)]
        captured.append(Captured(name.decode(), *shapes, dynamic_bytes, bool(overlaps), bytes(params)))

    callback = _CALLBACK(on_launch)
    with _capturing:
        cuda.emulator_on_launch(callback)
        try:
            function(*arguments)
        except RuntimeError as error:
            if name := cuda.emulator_unsupported_call():
                raise EmulationError(f"the host stub calls {name.decode()}, which is not emulated") from error
            raise
        finally:
            cuda.emulator_on_launch(_CALLBACK())
    if unknown:
        raise EmulationError(f"the host stub launches {unknown[0]}, which is not in the PTX")
    return captured


def _run(
    program: Program,
    text: str,
    captured: Captured,
    regions: list[Region],
    before: list[np.ndarray],
    written: list[np.ndarray],
    seed: int,
    resident: int,
    check_races: bool,
) -> Statistics:
    """Runs one launch. ``written`` receives marks of what it writes; ``before`` are those of launches that may not have ended."""
    _check(captured, program.static_bytes)
    warps = -(-math.prod(captured.block) // 32)
    params = np.frombuffer(captured.params + bytes(16), np.uint8)
    marks = [(own.ctypes.data, other.ctypes.data) for own, other in zip(written, before, strict=True)]
    places = np.array([(*region[:2], *mark) for region, mark in zip(regions, marks, strict=True)] or [(0, 0, 0, 0)], np.uint64)
    arrays = (program.code, program.args, program.touched, program.constants, params, places, program.specials)
    request = _Launch(
        *(array.ctypes.data for array in arrays),
        seed,
        STEPS,
        len(program.code),
        len(program.constants),
        program.register_bytes,
        program.param_bytes,
        len(regions),
        program.static_bytes,
        captured.dynamic_bytes,
        program.local_bytes,
        resident,
        check_races,
        captured.overlaps,
        *((ctypes.c_int32 * 3)(*shape) for shape in (captured.grid, captured.block, captured.cluster)),
    )
    counters = np.zeros(len(_COUNTERS) + 1, np.uint64)
    warp_instructions = np.zeros(warps, np.uint64)
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    core = _core()
    with _running:
        failed = core.emulator_run(
            ctypes.byref(request), counters.ctypes.data, warp_instructions.ctypes.data, message, ctypes.c_uint64(MESSAGE_BYTES)
        )
    if failed:
        raise EmulationError(_explained(message.value.decode(), program, text, regions))
    return Statistics(
        kernel=captured.kernel,
        grid=captured.grid,
        block=captured.block,
        cluster=captured.cluster,
        shared_bytes=captured.dynamic_bytes + program.static_bytes,
        warp_instructions=tuple(map(int, warp_instructions)),
        **dict(zip(_COUNTERS, map(int, counters), strict=False)),
    )


def _check(captured: Captured, static_bytes: int) -> None:
    """What a device refuses to launch."""
    if any(size % cluster for size, cluster in zip(captured.grid, captured.cluster, strict=True)):
        raise EmulationError(f"grid {captured.grid}: must be whole clusters of {captured.cluster}")
    if not math.prod(captured.grid) or not 1 <= math.prod(captured.block) <= MOST_THREADS:
        raise EmulationError(f"grid {captured.grid} of blocks {captured.block}: must be at least one of at most {MOST_THREADS} threads")
    if any(size > most for size, most in zip(captured.grid, MOST_BLOCKS, strict=True)):
        raise EmulationError(f"grid {captured.grid}: must be at most {MOST_BLOCKS}")
    if static_bytes + captured.dynamic_bytes > MOST_SHARED_BYTES:
        raise EmulationError(f"{static_bytes + captured.dynamic_bytes} bytes of shared memory: at most {MOST_SHARED_BYTES} a block")


def _explained(message: str, program: Program, text: str, regions: list[Region]) -> str:
    """The core's message with the PTX of the lines, the names of tensors and of registers."""
    lines = text.split("\n")

    def line(match: re.Match) -> str:
        number = int(match[1])
        return f"line {number} ({' '.join(lines[number - 1].split())[:120]})"

    message = re.sub(r"\{line (\d+)\}", line, message)
    message = re.sub(r"\{tensor (\d+)\}", lambda match: regions[int(match[1])].name, message)
    return re.sub(r"\{register (\d+)\}", lambda match: program.register_name(int(match[1])), message)


__all__ = ["EmulationError", "PTXError", "Statistics", "launch", "run_ptx"]
