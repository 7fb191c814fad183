"""Exchanges between lanes, barriers, asynchronous copies and matrix products, from PTX to the core's instructions."""

import re

from cute_runtime.emulator.lowering import SCOPES, Lowering, handles
from cute_runtime.emulator.program import Read, Write
from cute_runtime.emulator.ptx import TYPE_BYTES, PTXError

# ---- lanes ----


@handles("shfl")
def _shuffle(s: Lowering) -> None:
    s.count(5)
    s.need("sync")
    s.need("b32")
    mode = ("up", "down", "bfly", "idx").index(s.need("up", "down", "bfly", "idx"))
    targets = [token for token in s.operands[0] if token != "|"]
    args = [s.target(targets[0], 4), s.target(targets[1], 0) if len(targets) > 1 else Write(-1)]
    s.emit("shfl", [*args, *(s.source(operand, 4) for operand in s.operands[1:])], a=mode)


@handles("vote")
def _vote(s: Lowering) -> None:
    s.count(3)
    s.need("sync")
    mode = s.need("all", "any", "uni", "ballot")
    width = 4 if mode == "ballot" else 0
    s.need("b32" if mode == "ballot" else "pred")
    a, negated = s.predicate(s.operands[1])
    args = [s.target(s.operands[0], width), a, s.source(s.operands[2], 4)]
    s.emit("vote", args, a=("all", "any", "uni", "ballot").index(mode), b=negated)


@handles("match")
def _match(s: Lowering) -> None:
    s.count(3)
    s.need("sync")
    mode, width = s.need("any", "all"), TYPE_BYTES[s.ptx_type()]
    targets = [token for token in s.operands[0] if token != "|"]
    args = [s.target(targets[0], 4)]
    if mode == "all":
        args.append(s.target(targets[1], 0) if len(targets) > 1 else Write(-1))
    s.emit(f"match_{mode}", [*args, s.source(s.operands[1], width), s.source(s.operands[2], 4)], a=width)


@handles("redux")
def _reduce(s: Lowering) -> None:
    s.count(3)
    s.need("sync")
    operation = s.need("add", "min", "max", "and", "or", "xor")
    ptx_type = s.need("s32", "u32", "b32").replace("b", "u")
    args = [s.target(s.operands[0], 4), s.source(s.operands[1], 4), s.source(s.operands[2], 4)]
    s.emit("redux", args, a=("add", "min", "max", "and", "or", "xor").index(operation), b=s.type_number(ptx_type))


@handles("elect")
def _elect(s: Lowering) -> None:
    s.count(2)
    s.need("sync")
    leader, _, chosen = s.operands[0]
    s.emit("elect", [s.target(leader, 4), s.target(chosen, 0), s.source(s.operands[1], 4)])


@handles("activemask")
def _active(s: Lowering) -> None:
    s.need("b32")
    s.emit("activemask", [s.target(s.operands[0], 4)])


# ---- barriers ----


@handles("bar", "barrier")
def _barrier(s: Lowering) -> None:
    if s.take("warp"):
        s.need("sync")
        s.emit("bar_warp", [s.source(s.operands[0], 4)])
        return
    if s.take("cluster"):
        action = s.need("arrive", "wait")
        relaxed = s.take("relaxed", "release", "acquire") == "relaxed"
        s.take("aligned")
        s.emit(f"cluster_{action}", a=relaxed)
        return
    s.take("cta")
    action = s.need("sync", "arrive")
    s.take("aligned")
    s.count(1, 2)
    threads = s.source(s.operands[1], 4) if len(s.operands) > 1 else -1
    s.emit(f"bar_{action}", [s.source(s.operands[0], 4), threads])


@handles("mbarrier")
def _mbarrier(s: Lowering) -> None:
    s.need("b64")
    s.take("shared", "shared::cta", "shared::cluster")
    action = s.need("init", "inval", "arrive", "expect_tx", "test_wait", "try_wait")
    s.take("relaxed", "release", "acquire")
    s.take(*SCOPES)
    operands = s.operands
    if action == "init":
        s.emit("mbarrier_init", [*s.address(operands[0]), s.source(operands[1], 4)])
    elif action == "inval":
        s.emit("mbarrier_inval", s.address(operands[0]))
    elif action == "arrive":
        expects = bool(s.take("expect_tx"))
        state = s.target(operands[0], 8) if operands[0][0] != "[" else Write(-1)
        address, *rest = operands[0 if operands[0][0] == "[" else 1 :]
        count = -1 if expects or not rest else s.source(rest[0], 4)
        s.emit("mbarrier_arrive", [state, *s.address(address), count, s.source(rest[0], 4) if expects else -1])
    elif action == "expect_tx":
        s.emit("mbarrier_expect", [-1, *s.address(operands[0]), -1, s.source(operands[1], 4)])
    else:
        parity = bool(s.take("parity"))
        s.count(3, 4)  # the fourth is a hint for how long to suspend
        args = [s.target(operands[0], 0), *s.address(operands[1]), s.source(operands[2], 4 if parity else 8)]
        s.emit("mbarrier_wait", args, a=parity, b=action == "try_wait")


@handles("fence")
def _fence(s: Lowering) -> None:
    if s.take("mbarrier_init"):
        s.need("release")
        s.need("cluster")
        s.emit("fence_mbarrier_init")
    elif s.take("proxy"):
        if s.take("async"):
            s.take("shared::cta", "shared::cluster", "global")
            s.emit("fence_async")
        else:
            s.need("alias")
            s.emit("nothing")
    else:
        s.take("sc", "acq_rel", "acquire", "release")
        s.emit("fence_device" if s.need(*SCOPES) in ("gpu", "sys") else "nothing")


# ---- asynchronous copies ----


@handles("cp")
def _copy(s: Lowering) -> None:
    reduces = bool(s.take("reduce"))
    s.need("async")
    if s.take("bulk"):
        _bulk(s, reduces)
        return
    if reduces:
        raise PTXError("is not emulated")
    if s.take("commit_group"):
        s.emit("cp_async_commit")
    elif s.take("wait_group"):
        s.emit("cp_async_wait", a=int(s.operands[0][0]))
    elif s.take("wait_all"):
        s.emit("cp_async_commit")
        s.emit("cp_async_wait", a=0)
    elif s.take("mbarrier"):
        s.need("arrive")
        alone = bool(s.take("noinc"))
        s.need("shared", "shared::cta")
        s.need("b64")
        s.emit("cp_async_arrive", s.address(s.operands[0]), a=alone)
    else:
        kind = s.need("ca", "cg")
        s.need("shared", "shared::cta")
        s.need("global")
        policy = any(name.endswith("cache_hint") for name in s.modifiers)
        s.modifiers[:] = [name for name in s.modifiers if not name.startswith("L2::")]
        operands = s.operands[:-1] if policy else s.operands
        size = int(operands[2][0])
        if size not in ((16,) if kind == "cg" else (4, 8, 16)) or len(operands) > 4:
            raise PTXError(f"of {size} bytes in this form is not emulated")
        wanted = s.source(operands[3], 4) if len(operands) > 3 else -1
        s.emit("cp_async", [*s.address(operands[0]), *s.address(operands[1]), wanted], a=size)


def _bulk(s: Lowering, reduces: bool) -> None:
    if s.take("commit_group"):
        s.emit("bulk_commit")
        return
    if s.take("wait_group"):
        s.take("read")
        s.emit("bulk_wait", a=int(s.operands[0][0]))
        return
    if s.take("prefetch"):
        s.modifiers.clear()
        s.emit("nothing")
        return
    tensor = bool(s.take("tensor"))
    rank = int(s.need("1d", "2d", "3d", "4d", "5d")[0]) if tensor else 0
    if s.take("tile") and not tensor:
        raise PTXError("a tile without a tensor")
    policy = any(name.endswith("cache_hint") for name in s.modifiers)
    s.modifiers[:] = [name for name in s.modifiers if not name.endswith("cache_hint")]
    if reduces:
        s.need("add")
    operands = s.operands[:-1] if policy else list(s.operands)
    load = s.modifiers[0] != "global"
    multicast = -1
    if load:
        s.need("shared::cta", "shared::cluster")
        s.need("global")
        s.need("mbarrier::complete_tx::bytes")
        if s.take("multicast::cluster"):
            multicast = s.source(operands.pop(), 2)
        barrier = s.address(operands.pop())
        shared, outside = operands[0], operands[1]
    else:
        s.need("global")
        s.need("shared::cta")
        s.need("bulk_group")
        barrier = [-1, 4, 0]
        outside, shared = operands[0], operands[1]
    args = s.address(shared)
    if tensor:
        inner = outside[1:-1]
        comma = inner.index(",")
        coordinates = [token for token in inner[comma + 1 :] if token not in ("{", "}", ",")]
        if len(coordinates) != rank or len(operands) != 2:
            raise PTXError("with these operands is not emulated")
        args += [*s.address_in(inner[:comma]), *barrier, multicast, *(s.source(token, 4) for token in coordinates)]
    else:
        if len(operands) != 3:
            raise PTXError("with these operands is not emulated")
        args += [*s.address(outside), *barrier, multicast, s.source(operands[2], 4)]
    s.emit(("tile" if tensor else "bulk") + ("_load" if load else "_store"), args, a=rank, b=reduces)


# ---- matrix products ----

_SHAPE = re.compile(r"m64n(\d+)k16")


@handles("wgmma")
def _wgmma(s: Lowering) -> None:
    action = s.need("mma_async", "fence", "commit_group", "wait_group")
    s.need("sync")
    s.need("aligned")
    if action != "mma_async":
        s.emit(f"wgmma_{action.removesuffix('_group')}", a=int(s.operands[0][0]) if action == "wait_group" else 0)
        return
    shape = _SHAPE.fullmatch(s.modifiers.pop(0))
    n = int(shape[1]) if shape else 0
    types = s.modifiers[:]
    s.modifiers.clear()
    if not shape or n % 8 or not 8 <= n <= 256 or types not in (["f32", "bf16", "bf16"], ["f32", "f16", "f16"]):
        raise PTXError(f"of {'.'.join(types)} in this shape is not emulated")
    d, a, b, scale, *flags = s.operands
    in_registers = a[0] == "{"
    accumulators, fragment = s.vector(d), s.vector(a) if in_registers else []
    if len(accumulators) != n // 2 or (in_registers and len(fragment) != 4) or len(flags) != (3 if in_registers else 4):
        raise PTXError("has a wrong number of operands")
    negate_a, negate_b, *transposed = (int(flag[0]) for flag in flags)
    if negate_a not in (1, -1) or negate_b not in (1, -1):
        raise PTXError("imm-scale must be 1 or -1")
    transpose_a, transpose_b = ([0] if in_registers else []) + transposed
    bits = (types[1] == "f16") + 2 * transpose_a + 4 * transpose_b + 8 * (negate_a < 0) + 16 * (negate_b < 0) + 32 * in_registers
    predicate, negated = s.predicate(scale)
    registers = [int(s.source(name, 4)) for name in (*accumulators, *fragment)]
    descriptor_a = -1 if in_registers else s.source(a, 8)
    s.emit("wgmma", [Read(predicate), negated, descriptor_a, s.source(b, 8), *registers], a=n, b=bits)
