"""Barriers, tensor memory access and races in the emulator, each in a few lines of PTX."""

import struct

import numpy as np
import pytest

from cute_runtime.emulator import EmulationError, run_ptx
from cute_runtime.emulator.tensors import Region, Written

HEADER = """.version 8.8
.target sm_90a
.extern .shared .align 1024 .b8 memory[];
"""
SEEDS = range(6)


def kernel(body: str, params: str) -> str:
    """%s: shared memory, its first 8 bytes a barrier for the kernel to initialise; %warp, %lane, %thread; %p0: thread 0."""
    return f"""{HEADER}.visible .entry k({params})
{{
.reg .pred %p<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .b32 %s, %warp, %lane, %thread, %data; .reg .b64 %out, %map;
mov.u32 %s, memory; mov.u32 %thread, %tid.x; shr.u32 %warp, %thread, 5; mov.u32 %lane, %laneid; setp.eq.u32 %p0, %thread, 0;
add.u32 %data, %s, 1024;
{body}
ret;
}}
"""


def tensor_map(base: int, sizes: list[int], strides: list[int], box: list[int], *, swizzle: int = 0, half: bool = False) -> bytes:
    """128 bytes as host stubs write them; strides in bytes from dimension 1, elements float32 or float16."""
    word = 0x40002 | len(sizes) - 1 << 4 | (6 if half else 7) << 7 | swizzle << 13
    raw = bytearray(128)
    raw[:12] = struct.pack("<QI", base, word)
    for i, stride in enumerate(strides):
        struct.pack_into("<I", raw, 12 + 4 * i, stride // 16)
    for i, size in enumerate(sizes):
        struct.pack_into("<I", raw, 32 + 4 * i, size - 1)
    raw[55 : 55 + len(box)] = bytes(size - 1 for size in box)
    return bytes(raw)


def wait(address: str, parity: str) -> str:
    return f"{{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared.b64 done, [{address}], {parity}; @!done bra WAIT; }}"


INITIALISE = "@%p0 mbarrier.init.shared.b64 [%s], 1; fence.mbarrier_init.release.cluster; bar.sync 0;"
LOAD = """@%p0 mbarrier.arrive.expect_tx.shared.b64 %rd0, [%s], BYTES;
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%data], [map, {COLUMN, ROW}], [%s];"""
DUMP = """shl.b32 %r1, %thread, 4; add.u32 %r2, %data, %r1; cvt.u64.u32 %rd1, %r1; ld.param.u64 %out, [out]; add.u64 %rd2, %out, %rd1;
ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2]; st.global.v4.b32 [%rd2], {%r3, %r4, %r5, %r6};"""
MAP_PARAMS = ".param .u64 tensor, .param .align 64 .b8 map[128], .param .u64 out"


def load_box(column: int, row: int, swizzle: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A box of 8 rows x 8 float32 of a (10, 20) tensor, whose rows have 24 elements; returns (tensor, what lies in shared memory)."""
    tensor = np.arange(240, dtype=np.float32).reshape(10, 24)
    out = np.zeros((8, 8), np.float32)
    raw = tensor_map(tensor.ctypes.data, [20, 10], [96], [8, 8], swizzle=swizzle)
    load = LOAD.replace("BYTES", "256").replace("COLUMN", str(column)).replace("ROW", str(row))
    text = kernel(f"{INITIALISE} {load} {wait('%s', '0')} setp.lt.u32 %p1, %thread, 16; @!%p1 ret; {DUMP}", MAP_PARAMS)
    run_ptx(text, tensor, raw, out, block=(64,), dynamic_bytes=2048, seed=3)
    return tensor, out


@pytest.mark.parametrize(("column", "row"), [(0, 0), (16, 6), (-4, -3), (100, 0), (19, 9)])
def test_box_is_clipped_and_filled_with_zeros(column, row):
    tensor, out = load_box(column, row)
    padded = np.zeros((40, 140), np.float32)
    padded[10:20, 10:30] = tensor[:, :20]
    np.testing.assert_array_equal(out, padded[10 + row : 18 + row, 10 + column : 18 + column])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lane_whose_wait_is_over_does_not_wait_for_the_others(seed):
    """Lane 0's phase is over, that of the others ends by lane 0's arrival behind the same wait."""
    out = np.zeros(32, np.int32)
    arrive = "@%p1 mbarrier.arrive.shared.b64 %rd0, [%s];"
    store = "ld.param.u64 %out, [out]; mul.wide.u32 %rd1, %thread, 4; add.u64 %rd2, %out, %rd1; st.global.u32 [%rd2], 7;"
    body = f"{INITIALISE} setp.eq.u32 %p1, %lane, 0; selp.u32 %r1, 1, 0, %p1; {wait('%s', '%r1')} {arrive} {store}"
    run_ptx(kernel(body, ".param .u64 out"), out, block=(32,), dynamic_bytes=2048, seed=seed)
    assert (out == 7).all()


def test_swizzled_box_exchanges_pieces_of_16_bytes():
    tensor, out = load_box(8, 1, swizzle=1)
    pieces = tensor[1:9, 8:16].reshape(16, 4)
    where = np.arange(16) ^ (np.arange(16) >> 3 & 1)  # bit 4 of the address with bit 7
    np.testing.assert_array_equal(out.reshape(16, 4), pieces[where])


STORE = """shl.b32 %r1, %thread, 2; add.u32 %r2, %data, %r1; st.shared.b32 [%r2], %thread; FENCE bar.sync 0;
@%p0 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [map, {17, 7}], [%data]; @%p0 cp.async.bulk.commit_group; WAIT"""
FENCE_ASYNC, WAIT_READ = "fence.proxy.async.shared::cta;", "@%p0 cp.async.bulk.wait_group.read 0;"


def store_box(store: str) -> np.ndarray:
    tensor = np.full((10, 24), -1, np.int32)
    raw = tensor_map(tensor.ctypes.data, [20, 10], [96], [8, 8])
    run_ptx(kernel(store, ".param .u64 tensor, .param .align 64 .b8 map[128]"), tensor, raw, block=(64,), dynamic_bytes=2048, seed=2)
    return tensor


def test_stored_box_is_clipped():
    expected = np.full((10, 24), -1, np.int32)
    expected[7:, 17:20] = np.arange(64).reshape(8, 8)[:3, :3]
    np.testing.assert_array_equal(store_box(STORE.replace("FENCE", FENCE_ASYNC).replace("WAIT", WAIT_READ)), expected)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (STORE.replace("FENCE", "").replace("WAIT", WAIT_READ), "proxy: a bulk store reads shared memory at 0x800 that warp 0 .* wrote"),
        (STORE.replace("FENCE", FENCE_ASYNC).replace("WAIT", ""), "the warp ends before its bulk store at line .* has read"),
        (
            STORE.replace("FENCE", FENCE_ASYNC).replace("WAIT", f"@%p0 st.shared.b32 [%data], %r1; {WAIT_READ}"),
            "race: writes shared memory at 0x800 that bulk store of warp 0 .* reads",
        ),
        (STORE.replace("FENCE bar.sync 0;", FENCE_ASYNC).replace("WAIT", WAIT_READ), "a bulk store reads shared memory|nobody has written"),
    ],
)
def test_store_without_fence_wait_or_barrier_is_an_error(store, message):
    with pytest.raises(EmulationError, match=message):
        store_box(store)


def test_deadlock_names_warps_lines_and_what_is_missing():
    """Warp 1 waits for two arrivals of which warp 0 makes one, then waits at a named barrier."""
    body = f"""@%p0 mbarrier.init.shared.b64 [%s], 2; bar.sync 0; @%p0 mbarrier.arrive.shared.b64 _, [%s];
setp.eq.u32 %p1, %warp, 0; @%p1 bar.sync 3, 64; @!%p1 bra SECOND; ret; SECOND: {wait("%s", "0")}"""
    with pytest.raises(EmulationError) as caught:
        run_ptx(kernel(body, ".param .u64 unused"), 0, block=(64,), dynamic_bytes=64)
    report = str(caught.value)
    assert "deadlock: no warp can go on" in report
    assert "warp 0 of block (0,0,0), lanes 0xffffffff, waits at line" in report
    assert "barrier 3: 32 of 64 threads are missing" in report
    assert "mbarrier at 0x400, phase 0: 1 of 2 arrivals and 0 bytes are missing" in report


def test_transfer_of_fewer_bytes_than_expected_is_a_deadlock():
    tensor = np.zeros((10, 24), np.float32)
    load = LOAD.replace("BYTES", "272").replace("COLUMN", "0").replace("ROW", "0")
    text = kernel(f"{INITIALISE} {load} {wait('%s', '0')}", MAP_PARAMS)
    raw = tensor_map(tensor.ctypes.data, [20, 10], [96], [8, 8])
    with pytest.raises(EmulationError, match="0 of 1 arrivals and 16 bytes are missing"):
        run_ptx(text, tensor, raw, tensor, block=(64,), dynamic_bytes=2048)


PASS_ON = """setp.eq.u32 %p1, %warp, 0; shl.b32 %r1, %lane, 2; add.u32 %r2, %data, %r1; @%p1 st.shared.b32 [%r2], %lane;
MEET @!%p1 ld.shared.b32 %r3, [%r2];"""


@pytest.mark.parametrize("seed", SEEDS)
def test_read_without_a_barrier_is_a_race_in_every_order(seed):
    with pytest.raises(EmulationError, match=r"race: (reads|writes) shared memory|that nobody has written"):
        run_ptx(kernel(PASS_ON.replace("MEET", ""), ".param .u64 unused"), 0, block=(64,), dynamic_bytes=2048, seed=seed)
    run_ptx(kernel(PASS_ON.replace("MEET", "bar.sync 0;"), ".param .u64 unused"), 0, block=(64,), dynamic_bytes=2048, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_lane_arrives_for_the_others_only_after_they_met(seed):
    """Warp 0 reads a word and lane 0 frees it; warp 1 overwrites it."""
    body = f"""{INITIALISE} @%p0 st.shared.b32 [%data], 1; bar.sync 0; setp.eq.u32 %p1, %warp, 0; @!%p1 bra OTHER;
ld.shared.b32 %r1, [%data]; MEET @%p0 mbarrier.arrive.shared.b64 _, [%s]; ret;
OTHER: {wait("%s", "0")} setp.eq.u32 %p2, %lane, 0; @%p2 st.shared.b32 [%data], 2;"""
    run_ptx(kernel(body.replace("MEET", "bar.warp.sync -1;"), ".param .u64 u"), 0, block=(64,), dynamic_bytes=2048, seed=seed)
    with pytest.raises(EmulationError, match=r"race: writes shared memory at 0x800 that warp 0 .* reads"):
        run_ptx(kernel(body.replace("MEET", ""), ".param .u64 u"), 0, block=(64,), dynamic_bytes=2048, seed=seed)


COPY = """{ .reg .b64 from; ld.param.u64 from, [tensor]; mad.wide.u32 from, %lane, 16, from; shl.b32 %r1, %lane, 4; add.u32 %r2, %data, %r1;
cp.async.cg.shared.global [%r2], [from], 16, WANTED; }"""
COPY_PARAMS = ".param .u64 tensor, .param .u64 out"


def test_cp_async_zero_fills_and_arrives_when_it_has_landed():
    tensor, out = np.arange(128, dtype=np.float32).reshape(32, 4), np.zeros((32, 4), np.float32)
    copy = COPY.replace("WANTED", "%r5")
    body = f"""@%p0 mbarrier.init.shared.b64 [%s], 32; bar.sync 0; setp.lt.u32 %p1, %lane, 20; selp.b32 %r5, 16, 0, %p1;
setp.eq.u32 %p2, %warp, 0; @!%p2 bra READ; {copy} cp.async.mbarrier.arrive.noinc.shared.b64 [%s]; ret;
READ: {wait("%s", "0")} sub.u32 %thread, %thread, 32; {DUMP}"""
    for seed in SEEDS:
        out[:] = -1
        run_ptx(kernel(body, COPY_PARAMS), tensor, out, block=(64,), dynamic_bytes=2048, seed=seed)
        np.testing.assert_array_equal(out[:20], tensor[:20])
        assert not out[20:].any()


@pytest.mark.parametrize(("pending", "fails"), [(0, False), (1, True)])
def test_cp_async_is_there_only_after_its_group_was_waited_for(pending, fails):
    tensor, out = np.ones((32, 4), np.float32), np.zeros((32, 4), np.float32)
    body = f"{COPY.replace('WANTED', '16')} cp.async.commit_group; cp.async.wait_group {pending}; {DUMP}"
    if fails:
        with pytest.raises(EmulationError, match=r"race: reads shared memory at 0x800 that cp.async of warp 0 .* wrote"):
            run_ptx(kernel(body, COPY_PARAMS), tensor, out, dynamic_bytes=2048)
    else:
        run_ptx(kernel(body, COPY_PARAMS), tensor, out, dynamic_bytes=2048)
        assert out.all()


CLUSTER = f"""mov.u32 %r8, %cluster_ctarank; @%p0 mbarrier.init.shared.b64 [%s], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%s], 256; setp.eq.u32 %p1, %r8, 1; and.pred %p1, %p1, %p0; mov.b16 %mask, 3;
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
[%data], [map, {{8, 2}}], [%s], %mask;
{wait("%s", "0")} mov.u32 %r9, %ctaid.x; ld.param.u64 %out, [out]; shl.b32 %r1, %thread, 4; add.u32 %r2, %data, %r1;
mad.lo.u32 %r1, %r9, 256, %r1; cvt.u64.u32 %rd1, %r1; add.u64 %rd2, %out, %rd1; setp.lt.u32 %p2, %thread, 16; @!%p2 ret;
ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2]; st.global.v4.b32 [%rd2], {{%r3, %r4, %r5, %r6}};"""


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast_writes_and_arrives_in_both_blocks(seed):
    tensor = np.arange(240, dtype=np.float32).reshape(10, 24)
    out = np.zeros((4, 8, 8), np.float32)
    raw = tensor_map(tensor.ctypes.data, [24, 10], [96], [8, 8])
    run_ptx(
        kernel(f".reg .b16 %mask; {CLUSTER}", MAP_PARAMS),
        tensor,
        raw,
        out,
        grid=(4,),
        cluster=(2,),
        block=(64,),
        dynamic_bytes=2048,
        seed=seed,
    )
    np.testing.assert_array_equal(out, np.broadcast_to(tensor[2:10, 8:16], (4, 8, 8)))


def test_remote_arrival_orders_what_the_other_block_reads():
    """Block 1 writes into block 0's shared memory and arrives there; without the arrival's wait it is a race."""
    body = """mov.u32 %r8, %cluster_ctarank; @%p0 mbarrier.init.shared.b64 [%s], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive; barrier.cluster.wait; setp.eq.u32 %p1, %r8, 0; @%p1 bra READER;
mapa.shared::cluster.u32 %r1, %data, 0; mapa.shared::cluster.u32 %r2, %s, 0; @%p0 st.shared::cluster.b32 [%r1], 7;
@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2]; bra END;
READER: WAIT @!%p0 bra END; ld.shared.b32 %r3, [%data]; ld.param.u64 %out, [out]; st.global.b32 [%out], %r3;
END: barrier.cluster.arrive; barrier.cluster.wait;"""
    shape = {"grid": (2,), "cluster": (2,), "block": (32,), "dynamic_bytes": 2048}
    for seed in SEEDS:
        out = np.zeros(1, np.int32)
        run_ptx(kernel(body.replace("WAIT", wait("%s", "0")), ".param .u64 out"), out, seed=seed, **shape)
        assert out[0] == 7
        with pytest.raises(EmulationError, match=r"race|nobody has written"):
            run_ptx(kernel(body.replace("WAIT", ""), ".param .u64 out"), out, seed=seed, **shape)


ASYNC_STORE = f"""mov.u32 %r8, %cluster_ctarank; @%p0 mbarrier.init.shared.b64 [%s], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive; barrier.cluster.wait; setp.eq.u32 %p1, %r8, 1; @%p1 bra READER; shl.b32 %r1, %lane, 2; add.u32 %r1, %r1, %data;
mapa.shared::cluster.u32 %r1, %r1, 1; mapa.shared::cluster.u32 %r2, %s, 1; mad.lo.u32 %r3, %lane, 3, 5;
st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r1], %r3, [%r2]; mov.u32 %r3, 0; bra END;
READER: @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%s], 128; {wait("%s", "0")} shl.b32 %r1, %lane, 2; add.u32 %r2, %data, %r1;
ld.shared.b32 %r3, [%r2]; ld.param.u64 %out, [out]; cvt.u64.u32 %rd1, %r1; add.u64 %rd2, %out, %rd1; st.global.b32 [%rd2], %r3;
END: barrier.cluster.arrive; barrier.cluster.wait;"""
"""Each lane of block 0 sends a word to block 1, which awaits them all; what the register holds later is not sent."""

TOO_EARLY = r"race: reads shared memory at 0x8.. that st.async of warp 0 of block \(0,0,0\) wrote|nobody has written"
ASYNC_STORE_FAULTS = {
    "no wait": (wait("%s", "0"), "", TOO_EARLY),
    "too few bytes awaited": ("[%s], 128", "[%s], 64", f"{TOO_EARLY}|the block ends while the st.async of line 12 still writes"),
    "too many bytes awaited": ("[%s], 128", "[%s], 132", "0 of 1 arrivals and 4 bytes are missing"),
    "address not aligned": ("[%r1], %r3, [%r2]", "[%r1+2], %r3, [%r2]", "st.async: shared address 0x2000802: must be aligned to 4 bytes"),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_stores_are_there_with_the_phase_of_the_other_blocks_barrier(seed):
    out = np.zeros(32, np.int32)
    options = {"grid": (2,), "cluster": (2,), "block": (32,), "dynamic_bytes": 2048, "seed": seed}
    run_ptx(kernel(ASYNC_STORE, ".param .u64 out"), out, **options)
    np.testing.assert_array_equal(out, 3 * np.arange(32) + 5)
    for right, wrong, message in ASYNC_STORE_FAULTS.values():
        assert right in ASYNC_STORE
        with pytest.raises(EmulationError, match=message):
            run_ptx(kernel(ASYNC_STORE.replace(right, wrong), ".param .u64 out"), out, **options)


def test_block_that_leaves_too_early_is_caught_by_some_order():
    """Without a last barrier of the cluster, block 0 may be gone when block 1 arrives there."""
    body = """mov.u32 %r8, %cluster_ctarank; @%p0 mbarrier.init.shared.b64 [%s], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive; barrier.cluster.wait; mapa.shared::cluster.u32 %r2, %s, 0; setp.eq.u32 %p1, %r8, 1; and.pred %p1, %p1, %p0;
@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r2];"""
    failures = []
    for seed in range(12):
        try:
            run_ptx(kernel(body, ".param .u64 u"), 0, grid=(2,), cluster=(2,), dynamic_bytes=64, seed=seed)
        except EmulationError as error:
            failures.append(str(error))
    assert failures
    assert all("that block has ended" in failure for failure in failures)


def test_matrices_move_by_rows_and_transposed():
    """ldmatrix.trans of what stmatrix stored is each 8 x 8 matrix transposed."""
    body = """shl.b32 %r1, %lane, 4; add.u32 %r2, %data, %r1; mad.lo.u32 %r3, %lane, 2, 0; shl.b32 %r4, %r3, 16; add.u32 %r4, %r4, %r3;
add.u32 %r4, %r4, 65536; add.u32 %r5, %r4, 0x400040; stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r2], {%r4, %r5}; bar.warp.sync -1;
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r6, %r7}, [%r2];
ld.param.u64 %out, [out]; mad.wide.u32 %rd1, %lane, 8, %out; st.global.v2.b32 [%rd1], {%r6, %r7};"""
    out = np.zeros((32, 2, 2), np.uint16)
    run_ptx(kernel(body, ".param .u64 out"), out, dynamic_bytes=2048)
    for matrix in range(2):
        got = out[:, matrix].reshape(8, 8)  # lane l holds row l / 4, columns 2 (l % 4) and the next
        np.testing.assert_array_equal(got, (np.arange(64) + 64 * matrix).reshape(8, 8).T)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_launch_may_not_share_a_word(seed):
    """Two blocks write one word; a block reads what the other wrote; atomically, or after acquiring, they may."""
    write = "ld.param.u64 %out, [out]; mov.u32 %r1, %ctaid.x; STORE"
    options = {"grid": (2,), "seed": seed}
    for store, fails in {
        "@%p0 st.global.b32 [%out], %r1;": True,
        "@%p0 red.global.add.u32 [%out], 1;": False,
        "mad.wide.u32 %rd1, %r1, 4, %out; @%p0 st.global.b32 [%rd1], %r1;": False,
        "mad.wide.u32 %rd1, %r1, 4, %out; @%p0 st.global.b32 [%rd1], %r1; fence.acq_rel.gpu; ld.global.b64 %rd2, [%out];": False,
    }.items():
        text = kernel(write.replace("STORE", store), ".param .u64 out")
        if fails:
            with pytest.raises(EmulationError, match=r"race: writes argument 0 \(int32, shape \(2,\)\) at byte 0, which cluster [01] has"):
                run_ptx(text, np.zeros(2, np.int32), **options)
        else:
            run_ptx(text, np.zeros(2, np.int32), **options)


DEPENDENT = {
    "each warp waits": ("griddepcontrol.wait; READ", ""),
    "a barrier behind the warp that waits": ("@%p1 griddepcontrol.wait; bar.sync 0; READ", ""),
    "no barrier behind it": ("@%p1 griddepcontrol.wait; READ", "reads argument 0 .* which the launch before writes"),
    "a barrier before it": ("bar.sync 0; @%p1 griddepcontrol.wait; READ", "reads argument 0 .* which the launch before writes"),
    "no wait": ("bar.sync 0;", "the block ends without a griddepcontrol.wait"),
    "reads first": ("READ griddepcontrol.wait;", "reads argument 0 .* which the launch before writes"),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_dependent_launch_waits_before_it_reads_what_launches_before_write(name):
    """Two warps; the launch before has written the tensor's last word, under another name."""
    body, message = DEPENDENT[name]
    read = "ld.param.u64 %out, [out]; mad.wide.u32 %rd1, %thread, 4, %out; ld.global.b32 %r1, [%rd1];"
    text = kernel(f"setp.eq.u32 %p1, %warp, 0; {body.replace('READ', read)}", ".param .u64 out")
    tensor = np.zeros(64, np.int32)
    last = Region(tensor.ctypes.data + 63 * 4, 4, "last word")
    for seed in SEEDS:
        options = {"block": (64,), "seed": seed, "dynamic_bytes": 64, "history": [Written(last, np.array([1, 0, 0], np.uint32))]}
        if message:
            with pytest.raises(EmulationError, match=message):
                run_ptx(text, tensor, **options)
        else:
            run_ptx(text, tensor, **options)


def test_a_load_issued_before_the_wait_is_too_early_whenever_it_completes():
    tensor, out = np.zeros((10, 24), np.float32), np.zeros((8, 8), np.float32)
    raw = tensor_map(tensor.ctypes.data, [20, 10], [96], [8, 8])
    load = LOAD.replace("BYTES", "256").replace("COLUMN", "0").replace("ROW", "0")
    rest = f"{wait('%s', '0')} setp.lt.u32 %p1, %thread, 16; @!%p1 ret; {DUMP}"
    history = [Written(Region(tensor.ctypes.data, tensor.nbytes, "tensor"), np.ones(242, np.uint32))]
    options = {"block": (32,), "dynamic_bytes": 2048, "history": history}
    for seed in SEEDS:
        run_ptx(kernel(f"{INITIALISE} griddepcontrol.wait; {load} {rest}", MAP_PARAMS), tensor, raw, out, seed=seed, **options)
        with pytest.raises(EmulationError, match=r"reads argument 0 .* which the launch before writes"):
            run_ptx(kernel(f"{INITIALISE} {load} griddepcontrol.wait; {rest}", MAP_PARAMS), tensor, raw, out, seed=seed, **options)
