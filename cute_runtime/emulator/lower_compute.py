"""Arithmetic, moves, branches and memory accesses, from PTX to the core's instructions."""

from cute_runtime.emulator.lowering import FTZ, ROUNDING, SATURATE, SCOPES, SPACES, Lowering, handles
from cute_runtime.emulator.program import Read, Write
from cute_runtime.emulator.ptx import TYPE_BYTES, PTXError

HALVES = {"f16": 1, "f16x2": 2, "bf16": 1, "bf16x2": 2}
SHARED_WINDOW, LOCAL_WINDOW = 1 << 48, 3 << 48


def _suffix(ptx_type: str, *, signed: bool) -> str:
    """Name of an integer type in the core: b32 where the sign does not matter."""
    if ptx_type[0] in "bus" and ptx_type[1:] in ("16", "32", "64"):
        return ptx_type.replace("b", "u") if signed else "b" + ptx_type[1:]
    raise PTXError(f"type .{ptx_type} is not emulated")


# ---- computing ----


@handles("add", "sub", "min", "max", "mul", "mad", "fma", "div", "rem", "and", "or", "xor", "copysign")
def _arithmetic(s: Lowering) -> None:
    ptx_type = s.ptx_type()
    if ptx_type == "pred":
        s.count(3)
        (a, not_a), (b, not_b) = map(s.predicate, s.operands[1:])
        s.emit(f"{s.name}_pred", [s.target(s.operands[0], 0), a, b], a=not_a + 2 * not_b)
        return
    name = "fma" if s.name == "mad" and ptx_type[0] == "f" else s.name
    ternary = name in ("mad", "fma")
    s.count(4 if ternary else 3)
    width = TYPE_BYTES[ptx_type]
    if ptx_type in HALVES:
        name += "_nan" if s.take("NaN") else ""
        s.take("rn")
        args = [s.target(s.operands[0], width), *(s.source(operand, width) for operand in s.operands[1:])]
        s.emit(f"{name}_half", args, a=s.type_number(ptx_type.removesuffix("x2")), b=HALVES[ptx_type])
    elif ptx_type[0] == "f":
        name += "_nan" if s.take("NaN") else ""
        if name == "div":
            s.take("approx", "full")
        args = [s.target(s.operands[0], width), *(s.source(operand, width, is_float=True) for operand in s.operands[1:])]
        s.emit(f"{name}_{ptx_type}", args, flags=s.float_flags())
    else:
        part = s.need("lo", "hi", "wide") if name in ("mul", "mad") else ""
        signed = part in ("hi", "wide") or name in ("min", "max", "div", "rem")
        result = 2 * width if part == "wide" else width
        args = [s.target(s.operands[0], result), s.source(s.operands[1], width), s.source(s.operands[2], width)]
        if ternary:
            args.append(s.source(s.operands[3], result))
        s.emit(f"{name}_{part}_{_suffix(ptx_type, signed=signed)}" if part else f"{name}_{_suffix(ptx_type, signed=signed)}", args)


@handles("neg", "abs", "not", "cnot", "popc", "clz", "brev", "bfind", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _unary(s: Lowering) -> None:
    s.count(2)
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    if ptx_type == "pred":
        a, negated = s.predicate(s.operands[1])
        s.emit("not_pred", [s.target(s.operands[0], 0), a], a=negated)
    elif ptx_type in HALVES:
        if s.name not in ("neg", "abs"):
            raise PTXError(f"type .{ptx_type} is not emulated")
        args = [s.target(s.operands[0], width), s.source(s.operands[1], width)]
        s.emit(f"{s.name}_half", args, a=s.type_number(ptx_type.removesuffix("x2")), b=HALVES[ptx_type])
    elif ptx_type[0] == "f":
        s.take("approx")
        args = [s.target(s.operands[0], width), s.source(s.operands[1], width, is_float=True)]
        s.emit(f"{s.name}_{ptx_type}", args, flags=s.float_flags())
    else:
        result = 4 if s.name in ("popc", "clz", "bfind") else width
        signed = s.name in ("neg", "abs", "bfind")
        suffix = _suffix(ptx_type, signed=signed)
        s.emit(f"{s.name}_{suffix}", [s.target(s.operands[0], result), s.source(s.operands[1], width)])


@handles("shl", "shr")
def _shift(s: Lowering) -> None:
    s.count(3)
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    args = [s.target(s.operands[0], width), s.source(s.operands[1], width), s.source(s.operands[2], 4)]
    s.emit(f"{s.name}_{_suffix(ptx_type, signed=s.name == 'shr')}", args)


@handles("shf")
def _funnel_shift(s: Lowering) -> None:
    s.count(4)
    s.need("b32")
    direction, mode = s.need("l", "r"), s.need("wrap", "clamp")
    s.emit(f"shf_{direction}_{mode}", [s.target(s.operands[0], 4), *(s.source(operand, 4) for operand in s.operands[1:])])


@handles("bfe", "bfi")
def _bit_field(s: Lowering) -> None:
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    values = 1 if s.name == "bfe" else 2
    s.count(3 + values)
    args = [s.target(s.operands[0], width), *(s.source(operand, width) for operand in s.operands[1 : 1 + values])]
    args += [s.source(operand, 4) for operand in s.operands[1 + values :]]
    s.emit(f"{s.name}_{ptx_type}", args)


@handles("prmt", "lop3")
def _bytes_and_bits(s: Lowering) -> None:
    s.need("b32")
    s.count(5 if s.name == "lop3" else 4)
    table = int(s.operands[4][0], 0) if s.name == "lop3" else 0
    s.emit(f"{s.name}_b32", [s.target(s.operands[0], 4), *(s.source(operand, 4) for operand in s.operands[1:4])], a=table)


_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@handles("setp")
def _set_predicate(s: Lowering) -> None:
    s.count(3, 4)
    ptx_type = s.ptx_type()
    s.take("ftz")
    combine = s.take("and", "or", "xor")
    comparison = s.modifiers.pop(0)
    width = TYPE_BYTES[ptx_type]
    targets = [token for token in s.operands[0] if token != "|"]
    args = [s.target(targets[0], 0), s.target(targets[1], 0) if len(targets) > 1 else Write(-1)]
    args += [s.source(operand, width, is_float=ptx_type[0] == "f") for operand in s.operands[1:3]]
    third, negated = s.predicate(s.operands[3]) if combine else (-1, False)
    suffix = ptx_type if ptx_type[0] == "f" else _suffix(ptx_type, signed=True)
    name = f"setp_{_UNSIGNED.get(comparison, comparison)}_{suffix}"
    s.emit(name, [*args, third], a=("", "and", "or", "xor").index(combine), b=negated)


@handles("selp", "slct")
def _select(s: Lowering) -> None:
    s.count(4)
    third = s.modifiers.pop() if s.name == "slct" else ""
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    args = [s.target(s.operands[0], width), *(s.source(operand, width, is_float=ptx_type[0] == "f") for operand in s.operands[1:3])]
    if s.name == "selp":
        chosen, negated = s.predicate(s.operands[3])
        s.emit(f"selp_b{8 * width}", [*args, chosen], a=negated)
    else:
        kind = {"s32": "slct", "f32": "slct_f32"}.get(third)
        if kind is None:
            raise PTXError(f".{third} is not emulated")
        s.emit(f"{kind}_b{8 * width}", [*args, s.source(s.operands[3], 4)])


@handles("mov")
def _move(s: Lowering) -> None:
    s.count(2)
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    target, source = s.operands
    if ptx_type == "pred":
        a, negated = s.predicate(source)
        s.emit("mov_pred", [s.target(target, 0), a], a=negated)
    elif "{" in (target[0], source[0]):
        targets, sources = s.vector(target), s.vector(source)
        target_bytes, source_bytes = width // len(targets), width // len(sources)
        args = [s.target(token, target_bytes) for token in targets] + [s.source(token, source_bytes) for token in sources]
        s.emit("repack", args, a=target_bytes, b=source_bytes)
    elif source[0] in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo"):
        s.emit("clock", [s.target(target, width)], a=width)
    else:
        s.emit(f"mov_b{8 * width}", [s.target(target, width), s.source(source, width, is_float=ptx_type[0] == "f")])


@handles("cvt")
def _convert(s: Lowering) -> None:
    from_type, to_type = s.modifiers.pop(), s.modifiers.pop()
    flags = (FTZ if s.take("ftz") else 0) | (SATURATE if s.take("sat") else 0) | (128 if s.take("relu") else 0)
    rounding = s.take("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")
    flags |= ROUNDING.get(rounding[:2], 0) << 4 if rounding != "rna" else 0
    flags |= 64 if rounding.endswith("i") else 0
    if rounding == "rna" and to_type != "tf32":
        raise PTXError(".rna is not emulated here")
    if to_type in ("f16x2", "bf16x2"):
        s.count(3)
        args = [s.target(s.operands[0], 4), *(s.source(operand, 4, is_float=True) for operand in s.operands[1:])]
        s.emit("cvt_pack", args, a=s.type_number(to_type.removesuffix("x2")), b=s.type_number(from_type), flags=flags)
        return
    s.count(2)
    if from_type in ("bf16", "f16") and to_type in ("bf16", "f16") and rounding:
        raise PTXError("between formats of 16 bits is not emulated")
    target_width, source_width = s.width(s.operands[0][0], 4), s.width(s.operands[1][0], TYPE_BYTES[from_type])
    args = [s.target(s.operands[0], TYPE_BYTES[to_type], wider=True), target_width]
    args += [s.source(s.operands[1], TYPE_BYTES[from_type], is_float=from_type[0] == "f", wider=True), source_width]
    s.emit("cvt", args, a=s.type_number(to_type), b=s.type_number(from_type), flags=flags)


@handles("cvta")
def _convert_address(s: Lowering) -> None:
    s.count(2)
    s.need("u64")
    to_space = s.take("to")
    space = s.need("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
    window = {2: SHARED_WINDOW, 4: LOCAL_WINDOW}.get(SPACES.get(space, 1), 0)
    args = [s.target(s.operands[0], 8), s.source(s.operands[1], 8)]
    if not window:
        s.emit("mov_b64", args)
    elif to_space:
        s.emit("and_b64", [*args, Read(s.program.constant((1 << 48) - 1, 8))])
    else:
        s.emit("or_b64", [*args, Read(s.program.constant(window, 8))])


@handles("bra")
def _branch(s: Lowering) -> None:
    s.take("uni")
    s.program.branch(s.operands[0][0])


@handles("ret", "exit")
def _return(s: Lowering) -> None:
    s.take("uni")
    s.emit("ret")


@handles("trap")
def _trap(s: Lowering) -> None:
    s.emit("trap")


@handles("setmaxnreg")
def _registers(s: Lowering) -> None:
    for group in (("inc", "dec"), ("sync",), ("aligned",), ("u32",)):
        s.need(*group)
    s.emit("setmaxnreg", a=int(s.operands[0][0]))


@handles("griddepcontrol")
def _depend(s: Lowering) -> None:
    s.emit("grid_wait" if s.need("wait", "launch_dependents") == "wait" else "nothing")


@handles("membar")
def _memory_barrier(s: Lowering) -> None:
    s.emit("nothing" if s.need("cta", "gl", "sys") == "cta" else "fence_device")


@handles("nanosleep", "prefetch", "prefetchu", "pmevent", "discard", "applypriority")
def _nothing(s: Lowering) -> None:
    """What has no effect on values."""
    s.modifiers.clear()
    s.emit("nothing")


@handles("createpolicy")
def _cache_policy(s: Lowering) -> None:
    s.modifiers.clear()
    s.emit("mov_b64", [s.target(s.operands[0], 8), Read(s.program.constant(0, 8))])


# ---- memory ----


def _cache_hints(s: Lowering) -> None:
    s.modifiers[:] = [name for name in s.modifiers if not name.startswith(("L1::", "L2::"))]
    s.take("ca", "cg", "cs", "lu", "cv", "wb", "wt")


@handles("ld", "ldu", "st")
def _load_store(s: Lowering) -> None:
    if s.take("async"):
        _store_async(s)
        return
    policy = any(name.endswith("cache_hint") for name in s.modifiers)
    s.count(3 if policy else 2)
    _cache_hints(s)
    strength = s.take("volatile", "relaxed", "acquire", "release", "mmio")
    s.take("weak")
    acquires = s.take(*SCOPES) in ("gpu", "sys") and strength == "acquire"
    s.take("nc")
    space = SPACES[s.take(*SPACES)]
    elements = {"": 1, "v2": 2, "v4": 4, "v8": 8}[s.take("v2", "v4", "v8")]
    ptx_type = s.ptx_type()
    store = s.name == "st"
    address, value = (s.operands[0], s.operands[1]) if store else (s.operands[1], s.operands[0])
    args = [*s.address(address), bool(strength)]
    names = s.vector(value)
    if len(names) != elements:
        raise PTXError(f"moves {len(names)} elements, {elements} are named")
    width = TYPE_BYTES[ptx_type]
    for name in names:
        if store:
            operand = s.source(name, width, is_float=ptx_type[0] == "f", wider=True)
        else:
            operand = s.target("_" if elements > 1 and name in s.program.unread else name, width, wider=True)
        args += [operand, s.width(name, width)]
    s.emit(s.name.replace("ldu", "ld"), args, a=space, b=s.type_number(ptx_type))
    if acquires:
        s.emit("fence_device")


def _store_async(s: Lowering) -> None:
    s.count(3)
    s.take("weak")
    s.need("shared::cluster")
    s.need("mbarrier::complete_tx::bytes")
    if TYPE_BYTES[s.ptx_type()] != 4:
        raise PTXError("of anything but 4 bytes is not emulated")
    address, value, barrier = s.operands
    s.emit("st_async", [*s.address(address), s.source(value, 4), *s.address(barrier)])


@handles("atom", "red")
def _atomic(s: Lowering) -> None:
    _cache_hints(s)
    acquires = s.take("relaxed", "acquire", "release", "acq_rel").startswith("acq")
    acquires &= s.take(*SCOPES) in ("gpu", "sys")
    s.take("noftz")
    space = SPACES[s.take(*SPACES)]
    operation = s.need("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    ptx_type = s.ptx_type()
    width = TYPE_BYTES[ptx_type]
    operands = [["_"], *s.operands] if s.name == "red" else s.operands
    if len(operands) != (4 if operation == "cas" else 3):
        raise PTXError(f"has {len(s.operands)} operands")
    args = [*s.address(operands[1]), s.target(operands[0], width)]
    args += [s.source(operand, width, is_float=ptx_type[0] == "f") for operand in operands[2:]]
    if operation != "cas":
        args.append(-1)
    s.emit(f"atom_{operation}", args, a=space, b=s.type_number(ptx_type))
    if acquires:
        s.emit("fence_device")


@handles("ldmatrix", "stmatrix")
def _matrices(s: Lowering) -> None:
    for group in (("sync",), ("aligned",), ("m8n8",), ("b16",)):
        s.need(*group)
    s.take("shared", "shared::cta")
    count = int(s.need("x1", "x2", "x4")[1])
    transposed = bool(s.take("trans"))
    store = s.name == "stmatrix"
    address, registers = (s.operands[0], s.operands[1]) if store else (s.operands[1], s.operands[0])
    names = s.vector(registers)
    if len(names) != count:
        raise PTXError(f"moves {count} matrices, {len(names)} registers are named")
    s.emit(s.name, [*s.address(address), *((s.source if store else s.target)(name, 4) for name in names)], a=transposed)


@handles("mapa")
def _map_address(s: Lowering) -> None:
    s.count(3)
    width = TYPE_BYTES[s.ptx_type()]
    s.need("shared::cluster")
    s.emit("mapa", [s.target(s.operands[0], width), s.source(s.operands[1], width), s.source(s.operands[2], 4)], a=width)
