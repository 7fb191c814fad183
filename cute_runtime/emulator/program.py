"""The program that the core runs: instructions in a flat array, and the layout of a warp's register file.

Every operand of an instruction is the byte offset of a register of 32 lanes; special registers and constants have registers too, so
that the core need not tell them apart. lower_compute.py and lower_sync.py say what each PTX instruction becomes.
"""

import struct
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cute_runtime.emulator.ptx import TYPE_BYTES, Kernel, PTXError, Statement, Variable

LANES = 32
SLOT = 64
"""Registers begin at multiples of this."""

SHARED_BASE = 1024
PARAM_WINDOW = 2 << 48
TOUCHES_PRODUCT = 4

SPECIALS = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid"),
    *(f"%lanemask_{which}" for which in ("eq", "lt", "le", "gt", "ge")),
    *("%cluster_ctarank", "%cluster_nctarank"),
    *(f"%{name}.{axis}" for name in ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid") for axis in "xyz"),
    *("%smid", "%dynamic_smem_size", "%total_smem_size"),
]
"""In the order of core.c's enum special."""

INSTRUCTION = np.dtype(
    [(name, np.int32) for name in ["op", "line", "guard", "negated", "flags", "first", "count", "a", "b", "registers", "reads", "writes"]],
)
"""core.h's struct instruction."""


class Read(int):
    """Offset of a register that an instruction reads."""


class Write(int):
    """Offset of a register that an instruction writes."""


class Program:
    """One kernel's code for the core. ``opcodes`` are the core's, by name."""

    def __init__(self, kernel: Kernel, opcodes: dict[str, int]) -> None:
        self.kernel = kernel
        self.opcodes = opcodes
        self.line = 0
        self._guard = (-1, False)
        self._records: list[tuple[int, ...]] = []
        self._args: list[int] = []
        self._touched: list[int] = []
        self._branches: list[tuple[int, str, int]] = []
        self._starts: list[int] = []
        self._layout()

    def _layout(self) -> None:
        kernel, at = self.kernel, 0
        self.offsets: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        for name, ptx_type in kernel.registers.items():
            self.offsets[name], self.widths[name] = at, TYPE_BYTES[ptx_type]
            at += -(-max(TYPE_BYTES[ptx_type] * LANES, 4) // SLOT) * SLOT
        mentions = Counter(token for statement in kernel.statements for operand in statement.operands for token in operand)
        mentions.update(statement.guard[0] for statement in kernel.statements if statement.guard)
        used = mentions.keys() & set(SPECIALS)
        self.unread = {name for name in kernel.registers if mentions[name] == 1}
        """Registers that are named once: what a vector load puts there is of no interest."""
        self.specials = np.full(len(SPECIALS), -1, np.int32)
        for number, name in enumerate(SPECIALS):
            if name in used:
                self.offsets[name], self.widths[name] = at, 4
                self.specials[number] = at
                at += 4 * LANES
        self._constants_at = at
        self._constants = bytearray()
        self._constant_offsets: dict[tuple[int, int], int] = {}
        self.symbols: dict[str, int] = {}
        self.param_offsets, self.param_bytes = _place(kernel.params, 0)
        self.symbols |= {name: PARAM_WINDOW + offset for name, offset in self.param_offsets.items()}
        fixed = [variable for variable in kernel.shared if variable.size]
        offsets, end = _place(fixed, SHARED_BASE)
        self.symbols |= offsets
        for variable in kernel.shared:
            if not variable.size:
                end = -(-end // variable.alignment) * variable.alignment
                self.symbols[variable.name] = end
        self.static_bytes = end - SHARED_BASE
        offsets, self.local_bytes = _place(kernel.local, 0)
        self.symbols |= offsets
        self.product_registers = {
            self.offsets[token]
            for statement in kernel.statements
            if statement.opcode.startswith("wgmma.mma_async")
            for operand in statement.operands
            if operand[0] == "{"
            for token in operand
            if token in kernel.registers
        }

    def constant(self, bits: int, width: int) -> int:
        """Offset of a register that holds ``bits`` in every lane; width 0 is a predicate."""
        key = (bits & ((1 << 8 * max(width, 1)) - 1), width)
        if key not in self._constant_offsets:
            self._constant_offsets[key] = self._constants_at + len(self._constants)
            data = struct.pack("<I", 0xFFFFFFFF if bits else 0) if width == 0 else key[0].to_bytes(width, "little") * LANES
            self._constants += data + bytes(-len(data) % SLOT)
        return self._constant_offsets[key]

    def begin(self, statement: Statement) -> None:
        """The instructions that follow belong to this statement."""
        self.line = statement.line
        self._starts.append(len(self._records))
        self._guard = (-1, False)
        if statement.guard:
            name, negated = statement.guard
            if self.widths.get(name) != 0:
                raise PTXError(f"{name} is not a predicate")
            self._guard = (self.offsets[name], negated)

    def emit(self, name: str, args: Sequence[int] = (), *, a: int = 0, b: int = 0, flags: int = 0) -> None:
        if name not in self.opcodes:
            raise PTXError(f"{name} is not emulated")
        reads = [int(arg) for arg in args if isinstance(arg, Read)]
        writes = [int(arg) for arg in args if isinstance(arg, Write) and arg >= 0]
        if self.product_registers.intersection(reads + writes):
            flags |= TOUCHES_PRODUCT
        record = (self.opcodes[name], self.line, *self._guard, flags, len(self._args), len(args), a, b, len(self._touched))
        self._records.append((*map(int, record), len(reads), len(writes)))
        self._args += map(int, args)
        self._touched += reads + writes

    def branch(self, label: str) -> None:
        self._branches.append((len(self._records), label, self.line))
        self.emit("bra")

    def finish(self) -> None:
        """Resolves labels; afterwards the arrays are complete."""
        self._guard = (-1, False)
        self._starts.append(len(self._records))
        self.emit("ret")
        self.code = np.array(self._records, np.int32).view(INSTRUCTION).reshape(-1)
        for number, label, line in self._branches:
            if label not in self.kernel.labels:
                raise PTXError(f"line {line}: bra {label}: there is no such label")
            self.code["a"][number] = self._starts[self.kernel.labels[label]]
        self.args = np.array([*self._args, 0], np.int32)
        self.touched = np.array([*self._touched, 0], np.int32)
        self.constants = np.frombuffer(bytes(self._constants) + bytes(SLOT), np.uint8)
        self.register_bytes = self._constants_at + len(self.constants)

    def register_name(self, offset: int) -> str:
        """For messages."""
        return next((name for name, place in self.offsets.items() if place == offset), f"register {offset}")


def _place(variables: Sequence[Variable], at: int) -> tuple[dict[str, int], int]:
    offsets = {}
    for variable in variables:
        at = -(-at // variable.alignment) * variable.alignment
        offsets[variable.name] = at
        at += variable.size
    return offsets, at
