"""From PTX statements to the core's instructions. An instruction or a modifier that nobody handles is an error that names it."""

from cute_runtime.emulator import lower_compute, lower_sync  # noqa: F401  they enter their instructions into HANDLERS
from cute_runtime.emulator.lowering import HANDLERS, Lowering
from cute_runtime.emulator.program import Program
from cute_runtime.emulator.ptx import Kernel, PTXError


def lower(kernel: Kernel, opcodes: dict[str, int], types: dict[str, int]) -> Program:
    """The core's program for a kernel.

    Raises:
        PTXError: with the line and the instruction that is not emulated.
    """
    program = Program(kernel, opcodes)
    for statement in kernel.statements:
        try:
            program.begin(statement)
            handler = HANDLERS.get(statement.opcode.split(".")[0])
            if handler is None:
                raise PTXError("is not emulated")
            lowering = Lowering(program, statement, types)
            handler(lowering)
            lowering.end()
        except PTXError as error:
            text = " ".join([statement.opcode, ", ".join("".join(operand) for operand in statement.operands)])
            raise PTXError(f"line {statement.line}: {text[:200]}: {error}") from None
    program.finish()
    return program
