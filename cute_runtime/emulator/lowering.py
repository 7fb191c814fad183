"""One PTX statement on its way to the core's instructions: its modifiers and operands, and the table of who handles which opcode."""

import re
import struct
from collections.abc import Callable

from cute_runtime.emulator.program import Program, Read, Write
from cute_runtime.emulator.ptx import TYPE_BYTES, PTXError, Statement

FTZ, SATURATE = 1, 2
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3}
SPACES = {"": 0, "global": 1, "shared": 2, "shared::cta": 2, "shared::cluster": 2, "param": 3, "local": 4}
SCOPES = ("cta", "cluster", "gpu", "sys")

HANDLERS: dict[str, Callable[["Lowering"], None]] = {}


def handles(*names: str) -> Callable[[Callable], Callable]:
    """Enters a function for the opcodes that begin with these names."""

    def register(function: Callable) -> Callable:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


class Lowering:
    """One statement: its modifiers are taken one by one, what is left over at the end is an error."""

    def __init__(self, program: Program, statement: Statement, types: dict[str, int]) -> None:
        self.program = program
        self.emit = program.emit
        self.name, *self.modifiers = statement.opcode.split(".")
        self.operands = statement.operands
        self.types = types

    def end(self) -> None:
        if self.modifiers:
            raise PTXError(f".{self.modifiers[0]} is not emulated")

    def take(self, *names: str) -> str:
        """The first modifier that is one of ``names``, removed; "" if none is."""
        for modifier in self.modifiers:
            if modifier in names:
                self.modifiers.remove(modifier)
                return modifier
        return ""

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if not found:
            raise PTXError(f"one of {', '.join(names)} is expected")
        return found

    def ptx_type(self) -> str:
        """The type, always the last modifier."""
        if not self.modifiers or self.modifiers[-1] not in TYPE_BYTES:
            raise PTXError("its type is not emulated")
        return self.modifiers.pop()

    def type_number(self, ptx_type: str) -> int:
        """The core's number of a type of memory accesses and conversions."""
        name = ptx_type.replace("b", "u") if ptx_type[0] == "b" and ptx_type[1:].isdigit() else ptx_type
        if name not in self.types:
            raise PTXError(f"type .{ptx_type} is not emulated")
        return self.types[name]

    def count(self, *allowed: int) -> None:
        if len(self.operands) not in allowed:
            raise PTXError(f"has {len(self.operands)} operands")

    def float_flags(self) -> int:
        rounding = self.take(*ROUNDING)
        flags = ROUNDING[rounding or "rn"] << 4
        return flags | (FTZ if self.take("ftz") else 0) | (SATURATE if self.take("sat") else 0)

    # ---- operands ----

    def immediate(self, token: str, width: int, is_float: bool) -> int | None:
        """Bits of a literal, or None where it is none."""
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", token):
            bits = int(match[1], 16)
            return bits if width != 8 else int.from_bytes(struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]), "little")
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", token):
            bits = int(match[1], 16)
            return bits if width == 8 else struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]))[0]
        if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", token):
            value = int(match[2], 8 if re.fullmatch(r"0[0-7]+", match[2]) else 0) * (-1 if match[1] else 1)
            return int.from_bytes(struct.pack("<f" if width == 4 else "<d", value), "little") if is_float else value
        if is_float and re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", token):
            return int.from_bytes(struct.pack("<f" if width == 4 else "<d", float(token)), "little")
        return None

    def source(self, operand: list[str] | str, width: int, *, is_float: bool = False, wider: bool = False) -> Read:
        """Offset of a source of ``width`` bytes a lane: a register, a constant, a special register or the address of a variable."""
        tokens = [operand] if isinstance(operand, str) else operand
        program, token = self.program, tokens[0]
        if len(tokens) == 3 and tokens[1] == "+" and token in program.symbols:
            return Read(program.constant(program.symbols[token] + int(tokens[2]), width))
        if len(tokens) != 1:
            raise PTXError(f"operand {''.join(tokens)} is not emulated here")
        if token in program.offsets:
            found = program.widths[token]
            if found != width and not (wider and found >= width):
                raise PTXError(f"{token} has {found} bytes, {width} are expected")
            return Read(program.offsets[token])
        if token in program.symbols:
            return Read(program.constant(program.symbols[token], width))
        bits = self.immediate(token, width, is_float)
        if bits is None:
            raise PTXError(f"operand {token} is not known")
        return Read(program.constant(bits, width))

    def target(self, operand: list[str] | str, width: int, *, wider: bool = False) -> Write:
        tokens = [operand] if isinstance(operand, str) else operand
        if tokens == ["_"]:
            return Write(-1)
        found = self.program.widths.get(tokens[0])
        if len(tokens) != 1 or found is None or (found != width and not (wider and found >= width)):
            raise PTXError(f"target {''.join(tokens)}: a register of {width} bytes is expected")
        return Write(self.program.offsets[tokens[0]])

    def width(self, token: str, default: int) -> int:
        """Bytes a lane of a register; ``default`` for anything else."""
        return self.program.widths.get(token, default)

    def predicate(self, operand: list[str]) -> tuple[Read, bool]:
        """Offset and whether it is negated."""
        negated = operand[0] == "!"
        token = operand[-1]
        if bits := re.fullmatch(r"[01]", token):
            return Read(self.program.constant(int(bits[0]), 0)), negated
        return self.source(token, 0), negated

    def address(self, operand: list[str]) -> list[int]:
        """[register + constant] as the core takes it."""
        if operand[0] != "[" or operand[-1] != "]":
            raise PTXError(f"operand {''.join(operand)}: an address is expected")
        return self.address_in(operand[1:-1])

    def address_in(self, tokens: list[str]) -> list[int]:
        base, *rest = tokens
        offset = 0
        if rest:
            if rest[0] != "+" or len(rest) != 2:
                raise PTXError(f"address {''.join(tokens)} is not emulated")
            offset = int(rest[1], 0)
        if base in self.program.symbols:
            return [Read(self.program.constant(self.program.symbols[base] + offset, 8)), 8, 0]
        width = self.width(base, 8)
        return [self.source(base, width), width, offset]

    def vector(self, operand: list[str]) -> list[str]:
        """The elements of {a, b}, or of a single operand."""
        if operand[0] != "{":
            return ["".join(operand)]
        return [token for token in operand[1:-1] if token != ","]
