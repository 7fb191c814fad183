"""What the compiler made of a kernel, read from the machine code in its object: nothing here is an estimate."""

import math
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cute_runtime.builder import MissingToolError
from cute_runtime.objects import split_object

_FATBIN_MAGIC = 0xBA55ED50
_FATBIN_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes after it
_FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\S+?):?\s*$", re.MULTILINE)
_USAGE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")
_INFO = re.compile(r"^\.nv\.info\.(\S+)$", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_REQNTID\s+Format:\s+\S+\s+Value:\s+0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


REGISTERS = 65536
"""Of one multiprocessor, and so the most that a block may take."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one device function. Bytes are per thread (stack, local) or per block (shared, without what the launch asks for)."""

    variant: str
    function: str
    registers: int
    threads: int
    """Of a block as the kernel was compiled for, 0 where it does not say."""
    stack_bytes: int
    local_bytes: int
    static_shared_bytes: int
    instructions: int
    hgmma: int
    ldl: int
    """Loads from local memory: spilled registers, or an array that found no registers."""
    stl: int

    @property
    def uses_local_memory(self) -> bool:
        return bool(self.stack_bytes or self.local_bytes or self.ldl or self.stl)

    def faults(self, *, wgmma: bool = False) -> list[str]:
        """What must not be, one sentence each: local memory, registers that no launch gets, and, if asked for, no wgmma instruction."""
        faults = []
        if self.uses_local_memory:
            used = f"{self.stack_bytes} bytes of stack, {self.local_bytes} of local memory, {self.ldl} loads and {self.stl} stores"
            faults.append(f"{self.variant}: {used} in {self.function}: must be none, registers have spilled or an array found none")
        if self.registers * self.threads > REGISTERS:
            wanted = f"{self.registers} registers for each of {self.threads} threads"
            faults.append(f"{self.variant}: {wanted} in {self.function}: must be at most {REGISTERS} together")
        if wgmma and not self.hgmma:
            faults.append(f"{self.variant}: no HGMMA instruction in {self.function}: its products must run on wgmma")
        return faults


def read_resources(path: Path) -> list[Resources]:
    """The resources of every device function in a kernel object.

    Raises:
        MissingToolError: cuobjdump or nvdisasm is not installed.
        CorruptObjectError, FileNotFoundError: see :func:`cute_runtime.objects.split_object`.
    """
    tool = cuobjdump()
    manifest, shared_object = split_object(path)
    with tempfile.TemporaryDirectory(prefix="cute_runtime.") as scratch:
        file = Path(scratch) / "kernel.fatbin"
        file.write_bytes(_fat_binary(shared_object, path))
        usage = _by_function(_run(tool, "-res-usage", file))
        code = _by_function(_run(tool, "-sass", file))
        threads = _threads(_run(tool, "-elf", file))
    result = []
    for function, text in usage.items():
        numbers = {name: int(value) for name, value in _USAGE.findall(text)}
        opcodes = _OPCODE.findall(code[function])
        result.append(
            Resources(
                variant=manifest.variant,
                function=function,
                registers=numbers["REG"],
                threads=threads.get(function, 0),
                stack_bytes=numbers["STACK"],
                local_bytes=numbers["LOCAL"],
                static_shared_bytes=numbers["SHARED"],
                instructions=len(opcodes),
                hgmma=opcodes.count("HGMMA"),
                ldl=opcodes.count("LDL"),
                stl=opcodes.count("STL"),
            )
        )
    return result


def cuobjdump() -> Path:
    """cuobjdump of the Python packages, else on PATH. It calls nvdisasm, which must lie beside it or on PATH.

    Raises:
        MissingToolError: one of them is not installed.
    """
    in_packages = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump"))
    on_path = shutil.which("cuobjdump")
    for tool in [*in_packages, *([Path(on_path)] if on_path else [])]:
        if (tool.parent / "nvdisasm").exists() or shutil.which("nvdisasm"):
            return tool
    raise MissingToolError("cuobjdump and nvdisasm not found: get them with pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def _fat_binary(shared_object: bytes, path: Path) -> bytes:
    begin = shared_object.find(_FATBIN_MAGIC.to_bytes(4, "little"))
    if begin < 0:
        raise ValueError(f"{path}: holds no device code")
    _, _, header, size = _FATBIN_HEADER.unpack_from(shared_object, begin)
    return shared_object[begin : begin + header + size]


def _run(tool: Path, option: str, file: Path) -> str:
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def _threads(listing: str) -> dict[str, int]:
    """The threads of a block that each kernel was compiled for."""
    _, *parts = _INFO.split(listing)
    found = {function: _THREADS.search(text) for function, text in zip(parts[::2], parts[1::2], strict=True)}
    return {function: math.prod(int(number, 16) for number in match.groups()) for function, match in found.items() if match}


def _by_function(listing: str) -> dict[str, str]:
    """The parts of cuobjdump's output that follow each ``Function`` line."""
    _, *parts = _FUNCTION.split(listing)
    return dict(zip(parts[::2], parts[1::2], strict=True))
