"""The emulator's instructions, lane by lane, against numpy and Python; and what it refuses, by name."""

import math

import numpy as np
import pytest

from cute_runtime.emulator import EmulationError, PTXError, run_ptx

SUFFIX = {np.dtype(name): suffix for name, suffix in {"u4": "b32", "i4": "b32", "f4": "f32", "u8": "b64", "i8": "b64", "f8": "f64"}.items()}
SUFFIX |= {np.dtype("u2"): "b16", np.dtype("i2"): "b16", np.dtype("f2"): "b16"}
HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"


def kernel(body: str, params: int) -> str:
    """A kernel with parameters of 64 bits, whose values are in %base0, %base1, ...; the lane is in %lane."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = " ".join(f"ld.param.u64 %base{i}, [p{i}];" for i in range(params))
    return f"""{HEADER}.visible .entry k({names})
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .f64 %d<9>; .reg .b64 %base<{params}>;
.reg .b32 %lane; mov.u32 %lane, %laneid; {loads}
{body}
ret;
}}
"""


def lanes(instruction: str, out: str, *arrays: np.ndarray) -> np.ndarray:
    """Runs an instruction on %d and %a, %b, %c (as many as there are arrays of 32) and returns the 32 results of dtype ``out``."""
    result = np.zeros(32, out)
    body = []
    for i, (name, array) in enumerate(zip("abc", arrays, strict=False)):
        suffix = SUFFIX[array.dtype]
        body.append(f".reg .{suffix} %{name}; mad.wide.u32 %rd{i}, %lane, {array.itemsize}, %base{i};")
        body.append(f"ld.global.{suffix} %{name}, [%rd{i}];")
    suffix = SUFFIX[result.dtype]
    body.append(f".reg .{suffix} %x; {instruction}")
    body.append(f"mad.wide.u32 %rd9, %lane, {result.itemsize}, %base{len(arrays)}; st.global.{suffix} [%rd9], %x;")
    run_ptx(kernel("\n".join(body), len(arrays) + 1), *arrays, result)
    return result


RANDOM = np.random.default_rng(0)
U = RANDOM.integers(0, 2**32, (3, 32), dtype=np.uint32)
S = U.view(np.int32)
SMALL = RANDOM.integers(0, 40, 32, dtype=np.uint32)
Q = RANDOM.integers(0, 2**64, (3, 32), dtype=np.uint64)
F = RANDOM.standard_normal((3, 32)).astype(np.float32)
F[0, :5] = np.nan, np.inf, -np.inf, 0, -0.0
HALF = RANDOM.standard_normal((3, 32)).astype(np.float16)

INTEGERS = {
    "add.s32 %x, %a, %b;": (U[:2], lambda a, b: a + b),
    "sub.s32 %x, %a, -7;": (U[:1], lambda a: a + np.uint32(7)),
    "mul.hi.s32 %x, %a, %b;": (S[:2], lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32)),
    "mad.lo.s32 %x, %a, %b, %c;": (U, lambda a, b, c: a * b + c),
    "shl.b32 %x, %a, %b;": ((U[0], SMALL), lambda a, b: np.where(b < 32, a << np.minimum(b, 31), 0)),
    "shr.s32 %x, %a, %b;": ((S[0], SMALL.view(np.int32)), lambda a, b: a >> np.minimum(b, 31)),
    "shr.u32 %x, %a, %b;": ((U[0], SMALL), lambda a, b: np.where(b < 32, a >> np.minimum(b, 31), 0)),
    "bfe.u32 %x, %a, 5, 9;": (U[:1], lambda a: a >> 5 & 511),
    "bfe.s32 %x, %a, 5, 9;": (S[:1], lambda a: (a >> 5 & 511 ^ 256) - 256),
    "bfi.b32 %x, %a, %b, 4, 8;": (U[:2], lambda a, b: b & ~np.uint32(0xFF0) | (a & 255) << 4),
    "prmt.b32 %x, %a, %b, 0x7610;": (U[:2], lambda a, b: a & 0xFFFF | b & np.uint32(0xFFFF0000)),
    "prmt.b32 %x, %a, %b, 0x888b;": (U[:2], lambda a, b: (a >> 31) * 0xFF | (a >> 7 & 1) * np.uint32(0xFFFFFF00)),
    "lop3.b32 %x, %a, %b, %c, 0xe8;": (U, lambda a, b, c: a & b | a & c | b & c),
    "shf.l.wrap.b32 %x, %a, %b, 12;": (U[:2], lambda a, b: b << 12 | a >> 20),
    "shf.r.clamp.b32 %x, %a, %b, 40;": (U[:2], lambda a, b: b),
    "popc.b32 %x, %a;": (U[:1], lambda a: np.array([int(value).bit_count() for value in a], np.uint32)),
    "clz.b32 %x, %a;": (U[:1], lambda a: np.array([32 - int(value).bit_length() for value in a], np.uint32)),
    "brev.b32 %x, %a;": (U[:1], lambda a: np.array([int(f"{value:032b}"[::-1], 2) for value in a], np.uint32)),
    "min.s32 %x, %a, %b;": (S[:2], np.minimum),
    "max.u32 %x, %a, %b;": (U[:2], np.maximum),
    "div.u32 %x, %a, %b;": ((U[0], SMALL + 1), lambda a, b: a // b),
    "rem.s32 %x, %a, %b;": ((S[0], SMALL.view(np.int32) + 1), lambda a, b: np.fmod(a, b)),
    "div.s64 %x, %a, 1000;": (Q[:1].view(np.int64), lambda a: np.trunc(a.astype(np.longdouble) / 1000).astype(np.int64)),
    "not.b64 %x, %a;": (Q[:1], np.invert),
    "mad.lo.s64 %x, %a, %b, %c;": (Q, lambda a, b, c: a * b + c),
    "abs.s32 %x, %a;": (S[:1], np.abs),
    ".reg .pred %q; setp.lt.s32 %q, %a, %b; selp.b32 %x, %a, %b, !%q;": (S[:2], np.maximum),
    ".reg .pred %q, %s; setp.lo.u32 %q|%s, %a, %b; selp.b32 %x, 1, 2, %s;": (U[:2], lambda a, b: np.where(a < b, 2, 1).astype(np.uint32)),
    "{ .reg .b16 l, h; mov.b32 {l, h}, %a; mov.b32 %x, {h, l}; }": (U[:1], lambda a: a << 16 | a >> 16),
    "cvt.s32.s8 %x, %a;": (S[:1], lambda a: a.astype(np.int8).astype(np.int32)),
    "cvt.sat.u8.s32 %x, %a;": (S[:1] // 2**22, lambda a: np.clip(a, 0, 255)),
}
FLOATS = {
    "add.f32 %x, %a, %b;": (F[:2], lambda a, b: a + b),
    "fma.rn.f32 %x, %a, %b, %c;": (F, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "max.f32 %x, %a, %b;": (F[:2], np.fmax),
    "max.NaN.f32 %x, %a, %b;": (F[:2], np.maximum),
    "abs.f32 %x, %a;": (F[:1], np.abs),
    "ex2.approx.ftz.f32 %x, %a;": (F[:1], np.exp2),
    "rcp.approx.ftz.f32 %x, %b;": (F[:2], lambda a, b: 1 / b),
    "cvt.sat.f32.f32 %x, %a;": (F[:1], lambda a: np.nan_to_num(np.clip(a, 0, 1))),
    "cvt.rn.f32.s32 %x, %a;": (S[:1], lambda a: a.astype(np.float32)),
    "copysign.f32 %x, %a, %b;": (F[1:], lambda a, b: np.copysign(b, a)),
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integer_instruction_gives_numpys_bits(instruction):
    arrays, reference = INTEGERS[instruction]
    expected = reference(*arrays)
    np.testing.assert_array_equal(lanes(instruction, expected.dtype.str, *arrays), expected)


@pytest.mark.parametrize("instruction", FLOATS)
def test_float_instruction_gives_numpys_values(instruction):
    arrays, reference = FLOATS[instruction]
    with np.errstate(invalid="ignore"):
        expected = reference(*arrays)
    np.testing.assert_allclose(lanes(instruction, "f4", *arrays), expected, rtol=2e-7)


def test_float_to_integer_rounds_as_told_and_saturates():
    values = np.array([0.5, 1.5, -0.5, 2.7, -2.7, 3e9, -3e9, np.nan] * 4, np.float32)
    for mode, expected in {
        "rni": [0, 2, 0, 3, -3, 2**31 - 1, -(2**31), -(2**31)],
        "rzi": [0, 1, 0, 2, -2, 2**31 - 1, -(2**31), -(2**31)],
        "rpi": [1, 2, 0, 3, -2, 2**31 - 1, -(2**31), -(2**31)],
    }.items():
        assert lanes(f"cvt.{mode}.s32.f32 %x, %a;", "i4", values).tolist()[:8] == expected


def test_directed_rounding_brackets_the_exact_value():
    low, high = (lanes(f"fma.{mode}.f32 %x, %a, %b, %c;", "f4", *F[:, 5:].repeat(2, axis=1)[:, :32].copy()) for mode in ("rm", "rp"))
    exact = F[0, 5:].repeat(2)[:32].astype(np.longdouble) * F[1, 5:].repeat(2)[:32] + F[2, 5:].repeat(2)[:32]
    assert np.all(low <= exact)
    assert np.all(exact <= high)
    assert np.all(np.nextafter(low, np.float32(np.inf)) >= high)


def test_half_precision_rounds_once():
    expected = (HALF[0].astype(np.float64) * HALF[1] + HALF[2]).astype(np.float16)
    np.testing.assert_array_equal(lanes("fma.rn.f16 %x, %a, %b, %c;", "f2", *HALF), expected)
    np.testing.assert_array_equal(lanes("cvt.rn.f16.f32 %x, %a;", "f2", F[1]), F[1].astype(np.float16))
    bits = lanes("cvt.rn.bf16x2.f32 %x, %a, %b;", "u4", F[1], F[2])
    rounded = [(value.view(np.uint32) + 0x7FFF + (value.view(np.uint32) >> 16 & 1)) >> 16 for value in F[1:]]
    np.testing.assert_array_equal(bits, rounded[0] << 16 | rounded[1])


def test_shuffles_follow_segments_and_clamps():
    lane, value = np.arange(32), U[0]
    for mode, b, c, source in (
        ("up", 3, 0, np.where(lane >= 3, lane - 3, lane)),
        ("down", 3, 31, np.where(lane + 3 <= 31, lane + 3, lane)),
        ("bfly", 5, 31, lane ^ 5),
        ("idx", 2, 0x1C1F, lane & ~3 | 2),
        ("down", 1, 0x181F, np.where(lane % 8 + 1 <= 7, lane + 1, lane)),
    ):
        got = lanes(f"shfl.sync.{mode}.b32 %x, %a, {b}, {c}, -1;", "u4", value)
        np.testing.assert_array_equal(got, value[source], err_msg=mode)


def test_votes_matches_and_reductions_see_all_lanes():
    value = (U[0] % 3).astype(np.uint32)
    masks = np.array([sum(int(other == own) << lane for lane, other in enumerate(value)) for own in value], np.uint32)
    np.testing.assert_array_equal(lanes("match.any.sync.b32 %x, %a, -1;", "u4", value), masks)
    ballot = lanes(".reg .pred %q; setp.eq.s32 %q, %a, 1; vote.sync.ballot.b32 %x, %q, -1;", "u4", value)
    assert set(ballot.tolist()) == {int(masks[value == 1][0])}
    assert set(lanes("redux.sync.max.s32 %x, %a, -1;", "i4", S[0]).tolist()) == {int(S[0].max())}
    elected = lanes(".reg .pred %q; elect.sync %x|%q, -1; @!%q mov.b32 %x, 99;", "u4", value)
    assert sorted(elected.tolist())[-31:] == [99] * 31
    assert elected.min() == elected.tolist().index(elected.min())


def test_diverged_lanes_loop_their_own_way_and_meet_again():
    """Lane l halves until zero; then all lanes, together again, sum their counts."""
    body = """.reg .pred %q; mov.b32 %r1, %a; mov.b32 %x, 0;
LOOP: setp.eq.s32 %q, %r1, 0; @%q bra DONE; shr.u32 %r1, %r1, 1; add.s32 %x, %x, 1; bra LOOP;
DONE: redux.sync.add.s32 %r2, %x, -1; mul.lo.s32 %x, %x, 1000; add.s32 %x, %x, %r2;"""
    value = U[0] >> (np.arange(32, dtype=np.uint32))
    counts = np.array([int(one).bit_length() for one in value])
    np.testing.assert_array_equal(lanes(body, "i4", value), counts * 1000 + counts.sum())


def test_atomics_add_up_over_blocks_in_any_order():
    count, largest = np.zeros(4, np.uint32), np.zeros(1, np.float32)
    body = """and.b32 %r1, %lane, 3; mad.wide.u32 %rd1, %r1, 4, %base0; atom.global.add.u32 %r2, [%rd1], 1;
cvt.rn.f32.u32 %f1, %lane; red.global.add.f32 [%base1], %f1;"""
    for seed in range(3):
        run_ptx(kernel(body, 2), count, largest, grid=(5,), seed=seed)
    assert count.tolist() == [3 * 5 * 8] * 4
    assert largest[0] == 3 * 5 * 496


def test_scopes_of_inline_ptx_do_not_meet():
    body = """mov.b32 %x, %a;
{ .reg .b32 t; mov.b32 t, 1; bra DONE; add.s32 %x, %x, 100; DONE: add.s32 %x, %x, t; }
{ .reg .b32 t; mov.b32 t, 2; bra DONE; add.s32 %x, %x, 100; DONE: add.s32 %x, %x, t; }"""
    np.testing.assert_array_equal(lanes(body, "u4", U[0]), U[0] + 3)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frobnicate.b32 %x, %a;", r"line \d+: frobnicate.b32 %x, %a: is not emulated"),
        ("add.cc.s32 %x, %a, 1;", r"add.cc.s32 .*: .cc is not emulated"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1}, %rd1, %rd2, 1;", "s32.s8.s8 in this shape is not emulated"),
        ("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r1], %rd1, [%r1];", "of anything but 4 bytes is not emulated"),
        ("fence.proxy.tensormap.gpu;", "fence.proxy.tensormap.gpu"),
        ("mov.b32 %x, %rd1;", "%rd1 has 8 bytes, 4 are expected"),
        ("mov.b32 %x, nowhere;", "operand nowhere is not known"),
        ("bra NOWHERE;", "bra NOWHERE: there is no such label"),
    ],
)
def test_unknown_instruction_is_refused_by_name(instruction, message):
    with pytest.raises(PTXError, match=message):
        lanes(instruction, "u4", U[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "add.s64 %rd1, %base0, 128; st.global.b32 [%rd1], %lane;",
            r"line \d+ \(.*st.global.b32 .*\) warp 0 of block \(0,0,0\): writes 4 bytes of global memory at 0x[0-9a-f]+, outside"
            r" every tensor: the nearest is argument 0 \(float32, shape \(32,\)\), byte 128 of its 128",
        ),
        ("ld.global.b32 %r1, [%base0+-4];", "reads 4 bytes .* byte -4 of its 128"),
        ("ld.global.b64 %rd1, [%base0+4];", r"must be aligned to the 8 bytes accessed \(lane 0\)"),
        ("mov.b32 %r1, 2048; st.shared.b32 [%r1], %lane;", r"shared address 0x800, 4 bytes: the block has \[0x400, 0x400\)"),
        ("st.shared.b32 [%r1], %lane;", "address 0x7fff7fff: must be aligned"),  # a register that nobody has written
        ("trap;", "trap"),
        ("LOOP: bra LOOP;", "has taken"),
    ],
)
def test_bad_access_is_reported_with_line_and_tensor(body, message, monkeypatch):
    monkeypatch.setattr("cute_runtime.emulator.run.STEPS", 100_000)
    with pytest.raises(EmulationError, match=message):
        run_ptx(kernel(body, 1), np.zeros(32, np.float32))


def test_clock_counts_instructions():
    ticks = lanes("mov.u64 %rd20, %clock64; mov.u64 %x, %clock64; sub.s64 %x, %x, %rd20;", "u8", U[0])
    assert set(ticks.tolist()) == {1}
    assert math.isfinite(ticks.sum())
