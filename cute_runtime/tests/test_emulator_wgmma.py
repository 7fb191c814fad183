"""wgmma in the emulator: every operand layout that a descriptor can say, placed byte by byte by an independent rule, against numpy."""

from itertools import product

import numpy as np
import pytest

from cute_runtime.emulator import EmulationError, PTXError, run_ptx

K = 16
BASE_B = 16384
IMAGE = 49152
FENCE, COMMIT, WAIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


def kernel(n: int, product_ptx: str, dtype: str) -> str:
    """Copies an image to shared memory, multiplies, stores the accumulators. %da and %db are descriptors, %a0-%a3 a fragment."""
    mma = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {{{', '.join(f'%c{i}' for i in range(n // 2))}}}"
    stores = "".join(f"st.global.f32 [%rd7+{i // 4 * 32 + i // 2 % 2 * 32 * n + i % 2 * 4}], %c{i}; " for i in range(n // 2))
    return f""".version 8.8
.target sm_90a
.extern .shared .align 1024 .b8 image[];
.visible .entry k(.param .u64 source, .param .u64 out, .param .u64 a, .param .u64 b, .param .u64 fragment)
{{
.reg .pred %p<4>; .reg .b32 %r<40>; .reg .f32 %c<{n // 2}>; .reg .b32 %a<4>; .reg .b64 %rd<20>; .reg .b64 %da, %db;
ld.param.u64 %rd1, [source]; ld.param.u64 %rd2, [out]; ld.param.u64 %da, [a]; ld.param.u64 %db, [b]; ld.param.u64 %rd8, [fragment];
mov.u32 %r1, %tid.x; mov.u32 %r2, image; shl.b32 %r3, %r1, 4;
COPY: add.u32 %r4, %r2, %r3; cvt.u64.u32 %rd3, %r3; add.u64 %rd4, %rd1, %rd3;
ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd4]; st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
add.u32 %r3, %r3, 2048; setp.lt.u32 %p1, %r3, {IMAGE}; @%p1 bra COPY;
fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %r9, %r2, 4; cvt.u64.u32 %rd5, %r9; add.u64 %da, %da, %rd5; add.u64 %db, %db, %rd5;
mad.wide.u32 %rd9, %r1, 16, %rd8; ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%rd9];
{"".join(f"mov.f32 %c{i}, 0f3f800000; " for i in range(n // 2))}
{product_ptx.replace("MMA", mma)}
shr.u32 %r10, %r1, 5; shl.b32 %r10, %r10, 4; and.b32 %r11, %r1, 31; shr.u32 %r12, %r11, 2; add.u32 %r10, %r10, %r12;
and.b32 %r13, %r1, 3; shl.b32 %r13, %r13, 3; mad.lo.u32 %r14, %r10, {4 * n}, %r13; cvt.u64.u32 %rd6, %r14; add.u64 %rd7, %rd2, %rd6;
{stores}
ret;
}}
"""


def place(matrix: np.ndarray, image: bytearray, base: int, bits: int, mn_major: bool) -> int:
    """Writes (rows, K) elements where the descriptor says; returns the descriptor. bits: 0 no swizzle, 1, 2, 3 of 32, 64, 128 bytes."""
    rows, pitch, per_atom = len(matrix), 16 << bits, 8 << bits
    if mn_major:
        leading, stride = (128 * (rows // 8) + 128, 128) if bits == 0 else (16 * pitch, 8 * pitch)
    else:
        leading, stride = (16 * rows + 128, 128) if bits == 0 else (16, 8 * pitch)
    for r, k in product(range(rows), range(K)):
        if bits == 0:
            within = k % 8 * 16 + r % 8 * 2 if mn_major else r % 8 * 16 + k % 8 * 2
            at = within + (k // 8 * leading + r // 8 * stride if mn_major else r // 8 * stride + k // 8 * leading)
        elif mn_major:
            at = k % 8 * pitch + k // 8 * stride + r // per_atom * leading + r % per_atom * 2
        else:
            at = r % 8 * pitch + r // 8 * stride + k * 2
        at += base
        at ^= (at >> 7 & (1 << bits) - 1) << 4
        image[at : at + 2] = matrix[r, k].tobytes()
    return base >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | (0, 3, 2, 1)[bits] << 62


def multiply(
    a: np.ndarray,
    b: np.ndarray,
    bits: int = 3,
    mn_a: bool = False,
    mn_b: bool = False,
    dtype: str = "f16",
    tail: str | None = None,
    wrap: str = f"{FENCE} MMA, %da, %db, 1, 1, 1, %s; {COMMIT} {WAIT}",
    seed: int = 0,
) -> np.ndarray:
    image = bytearray(IMAGE)
    descriptors = place(a, image, 0, bits, mn_a), place(b, image, BASE_B, bits, mn_b)
    fragment = np.zeros((128, 8), a.dtype)
    for thread, i in product(range(128), range(8)):
        row, column = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8, thread % 4 * 2 + i % 2 + i // 4 * 8
        fragment[thread, i] = a[row, column]
    out = np.zeros((64, len(b)), np.float32)
    text = kernel(len(b), wrap.replace("%s", tail or f"{int(mn_a)}, {int(mn_b)}"), dtype)
    source = np.frombuffer(bytes(image), np.uint8).copy()
    run_ptx(text, source, out, *descriptors, fragment.view(np.uint16), block=(128,), dynamic_bytes=IMAGE, seed=seed)
    return out


def matrices(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((64, K)).astype(np.float16), random.standard_normal((n, K)).astype(np.float16)


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1 + a.astype(np.float64) @ b.astype(np.float64).T


@pytest.mark.parametrize(("bits", "mn_a", "mn_b"), list(product(range(4), (False, True), (False, True))))
def test_layout_of_the_descriptor(bits, mn_a, mn_b):
    a, b = matrices(64, seed=bits)
    np.testing.assert_allclose(multiply(a, b, bits, mn_a, mn_b), exact(a, b), atol=1e-5)


@pytest.mark.parametrize("n", [8, 24, 136, 256])
def test_every_multiple_of_eight_columns(n):
    a, b = matrices(n)
    np.testing.assert_allclose(multiply(a, b), exact(a, b), atol=1e-5)


def test_a_from_registers():
    a, b = matrices(32)
    got = multiply(a, b, wrap=f"{FENCE} MMA, {{%a0, %a1, %a2, %a3}}, %db, 1, 1, 1, 0; {COMMIT} {WAIT}")
    np.testing.assert_allclose(got, exact(a, b), atol=1e-5)


def test_bfloat16_signs_and_a_first_product_that_overwrites():
    a, b = (matrix.astype(np.float32).view(np.uint32) >> 16 for matrix in matrices(32))
    values = [(matrix << 16).view(np.float32) for matrix in (a, b)]
    got = multiply(a.astype(np.uint16), b.astype(np.uint16), dtype="bf16", wrap=f"{FENCE} MMA, %da, %db, 0, -1, 1, 0, 0; {COMMIT} {WAIT}")
    np.testing.assert_allclose(got, 1 - exact(*values), atol=1e-5)


def test_products_of_one_group_add_up_in_order():
    a, b = matrices(32)
    twice = f"{FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} {WAIT}"
    results = [multiply(a, b, wrap=twice, seed=seed) for seed in range(3)]
    np.testing.assert_allclose(results[0], 2 * exact(a, b) - 1, atol=1e-5)
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (f"MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} {WAIT}", "wgmma without any wgmma.fence before"),
        (f"{FENCE} mov.f32 %c3, 0f00000000; MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} {WAIT}", "%c3 was accessed since the last wgmma.fence"),
        (f"{FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT}", "%c0 is written by a wgmma that was not waited for"),
        (f"{FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; {WAIT} {COMMIT}", "%c0 is written by a wgmma that was not waited for"),
        (
            f"{FENCE} MMA, {{%a0, %a1, %a2, %a3}}, %db, 1, 1, 1, 0; {COMMIT} mov.b32 %a2, 0; {WAIT}",
            "%a2 is read by a wgmma that was not waited for",
        ),
        (
            f"{FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} setp.eq.u32 %p2, %r1, 0; @%p2 st.shared.b32 [%r2], %r1; {WAIT}",
            r"race: writes shared memory at 0x400 that wgmma of warp 0 of block \(0,0,0\) reads",
        ),
        (f"st.shared.b32 [%r2], %r1; bar.sync 0; {FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} {WAIT}", "race: writes shared memory"),
    ],
)
def test_misuse_is_an_error(wrap, message):
    a, b = matrices(32)
    with pytest.raises(EmulationError, match=message):
        multiply(a, b, wrap=wrap)


def test_generic_writes_need_a_proxy_fence():
    a, b = matrices(32)
    one_writes = (
        f"setp.eq.u32 %p2, %r1, 0; @%p2 st.shared.b32 [%r2], %r1; bar.sync 0; {FENCE} MMA, %da, %db, 1, 1, 1, 0, 0; {COMMIT} {WAIT}"
    )
    with pytest.raises(EmulationError, match=r"proxy: wgmma reads shared memory at 0x400 that warp 0 .* wrote at line .* without a fence"):
        multiply(a, b, wrap=one_writes)
    fenced = one_writes.replace("bar.sync 0;", "fence.proxy.async.shared::cta; bar.sync 0;")
    a[0, :2] = 0  # what thread 0 writes
    np.testing.assert_allclose(multiply(a, b, wrap=fenced), exact(a, b), atol=1e-5)


def test_unaligned_shape_is_refused():
    a, b = matrices(32)
    with pytest.raises(PTXError, match="wrong number of operands"):
        multiply(a, b, tail="0, 0, 0")
