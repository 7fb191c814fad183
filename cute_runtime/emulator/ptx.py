"""Reading PTX text: kernels with their parameters, registers and variables, and statements with their line numbers. Nothing is executed.

Scopes in braces, which inline PTX opens for registers and labels of its own, are resolved here: every name is unique afterwards.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

TYPE_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "b32": 4, "u32": 4}
TYPE_BYTES |= {"s32": 4, "f32": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 0}

_WORD = r'[^\s{};,:\[\]()"]+'
_TOKEN = re.compile(rf'"[^"]*"|{_WORD}(?:::{_WORD})*|[{{}};,:\[\]()]')  # shared::cta is one token
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(loc|file|version|target|address_size)\b[^\n]*$", re.MULTILINE)


class PTXError(ValueError):
    """PTX that the emulator cannot run; the message names the line and the instruction."""


class Statement(NamedTuple):
    """One instruction: ``guard`` is None or (predicate, negated); ``operands`` are lists of tokens with names resolved."""

    line: int
    guard: tuple[str, bool] | None
    opcode: str
    operands: list[list[str]]


class Variable(NamedTuple):
    """Storage: bytes and alignment; of a parameter, a shared or a local variable. ``size`` 0: as much as the launch asks for."""

    name: str
    size: int
    alignment: int


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    """Name to PTX type."""
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Name to the number of the statement behind it."""


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by name.

    Raises:
        PTXError: a construct that is not known.
    """
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        keep_lines = lambda match: "\n" * match.group().count("\n")  # noqa: E731
        text = _LINE_DIRECTIVE.sub("", _COMMENT.sub(keep_lines, text))
        self.tokens: list[str] = []
        self.lines: list[int] = []
        for number, line in enumerate(text.split("\n"), 1):
            found = _TOKEN.findall(line)
            self.tokens += found
            self.lines += [number] * len(found)
        self.at = 0
        self.shared: list[Variable] = []
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            line = self.lines[min(self.at, len(self.lines) - 1)]
            raise PTXError(f"line {line}: {token!r}: {expected or 'more'} is expected")
        self.at += 1
        return token

    def until(self, *ends: str) -> list[str]:
        tokens = []
        while self.peek() not in ends:
            tokens.append(self.take())
        return tokens

    def module(self) -> dict[str, Kernel]:
        kernels = {}
        while self.peek():
            words = self.until(";", "(", "{")
            if ".entry" in words:
                kernel = self.kernel(words[words.index(".entry") + 1])
                kernels[kernel.name] = kernel
            elif ".shared" in words and self.peek() == ";":
                self.shared.append(_variable(words[words.index(".shared") + 1 :]))
                self.take(";")
            else:
                raise PTXError(f"line {self.lines[self.at - 1]}: {' '.join(words)}: such a module variable or function is not emulated")
        return kernels

    def kernel(self, name: str) -> Kernel:
        kernel = Kernel(name, shared=list(self.shared))
        if self.peek() == "(":
            self.take("(")
            while self.peek() != ")":
                words = self.until(",", ")")
                kernel.params.append(_variable([word for word in words[1:] if word not in (".ptr", ".global")]))
                if self.peek() == ",":
                    self.take(",")
            self.take(")")
        self.until("{")  # .reqntid and the like
        self.block(kernel)
        return kernel

    def block(self, kernel: Kernel) -> None:
        self.take("{")
        self.scope_count += 1
        scope: dict[str, str] = {}
        self.scopes.append(scope)
        suffix = "" if len(self.scopes) == 1 else f"@{self.scope_count}"
        self.declare_labels(scope, suffix)
        while self.peek() != "}":
            token = self.peek()
            if token == "{":
                self.block(kernel)
            elif token == ";":
                self.take(";")
            elif token.startswith("."):
                self.directive(kernel, scope, suffix)
            elif self.at + 1 < len(self.tokens) and self.tokens[self.at + 1] == ":":
                kernel.labels[self.resolve(self.take())] = len(kernel.statements)
                self.take(":")
            else:
                kernel.statements.append(self.statement())
        self.take("}")
        self.scopes.pop()

    def declare_labels(self, scope: dict[str, str], suffix: str) -> None:
        """Labels may be used before they stand: finds those of this scope, not of the scopes in it."""
        depth, at, start = 0, self.at, True
        while depth >= 0:
            token = self.tokens[at]
            if token in "{}":
                depth += 1 if token == "{" else -1
            elif depth == 0 and start and self.tokens[at + 1] == ":":
                scope[token] = token + suffix
            start = token in "{};:"
            at += 1

    def directive(self, kernel: Kernel, scope: dict[str, str], suffix: str) -> None:
        line = self.lines[self.at]
        words = self.until(";")
        self.take(";")
        if words[0] == ".reg":
            ptx_type = words[1].lstrip(".")
            if ptx_type not in TYPE_BYTES:
                raise PTXError(f"line {line}: .reg .{ptx_type}: registers of this type are not emulated")
            for name in "".join(words[2:]).split(","):
                base, _, count = name.partition("<")
                for full in [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]:
                    scope[full] = full + suffix
                    kernel.registers[full + suffix] = ptx_type
        elif words[0] in (".shared", ".local"):
            variable = _variable(words[1:])
            scope[variable.name] = variable.name + suffix
            getattr(kernel, words[0][1:]).append(variable._replace(name=variable.name + suffix))
        elif words[0] != ".pragma":
            raise PTXError(f"line {line}: {' '.join(words)}: is not emulated")

    def resolve(self, token: str) -> str:
        for scope in reversed(self.scopes):
            if token in scope:
                return scope[token]
        return token

    def statement(self) -> Statement:
        line = self.lines[self.at]
        guard = None
        if self.peek().startswith("@"):
            name = self.take()[1:]
            guard = (self.resolve(name.lstrip("!")), name.startswith("!"))
        opcode = self.take()
        operands: list[list[str]] = [[]]
        depth = 0
        while self.peek() != ";" or depth:
            token = self.take()
            if token == "," and not depth:
                operands.append([])
                continue
            depth += (token in ("{", "[")) - (token in ("}", "]"))
            # "%r1|%p2", "!p", "a+4"
            parts = [part for part in re.split(r"([|!]|(?<=[\w$])[+](?=[\d-]))", token) if part]
            operands[-1] += [self.resolve(part) for part in parts]
        self.take(";")
        return Statement(line, guard, opcode, [] if operands == [[]] else operands)


def _variable(words: list[str]) -> Variable:
    """``.align 16 .b8 name [ 4096 ]`` or ``.u32 name``."""
    alignment, words = (int(words[1]), words[2:]) if words[0] == ".align" else (0, words)
    size = TYPE_BYTES[words[0].lstrip(".")]
    name, rest = words[1], words[2:]
    if rest and rest[:1] == ["["]:
        count = int(rest[1]) if rest[1] != "]" else 0
        return Variable(name, size * count, alignment or size)
    if rest:
        raise PTXError(f"{' '.join(words)}: an initialised variable is not emulated")
    return Variable(name, size, alignment or size)
