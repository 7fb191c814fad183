"""The expert GEMMs without a GPU: tiles obey their rules, one variant of each kind is built for sm_90a and read back, and emulated."""

import re
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from cute_runtime.emulator.tensors import Region, Written
from dispatch import DispatchPlan, plan
from dispatch.kernels.sizes import TICKETS
from sonicmoe.backends import reference
from sonicmoe.backends.arguments import fast_memory
from sonicmoe.kernels import tiles, variants
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, SMALL, SQUARE, TALL, TILES, WIDE, Tile

BUILT = {
    "gathered, interleaved, z and bias": variants.up_projection(
        tile=TALL, dtype="bfloat16", activation="swiglu", interleaved=True, store_z=True, bias=True
    ),
    "gathered, concatenated, cluster, fp16": variants.up_projection(
        tile=PAIR, dtype="float16", activation="geglu", interleaved=False, store_z=True, bias=False
    ),
    "dense, ping-pong, bias": variants.down_projection(tile=BROAD, dtype="bfloat16", bias=True),
    "gathered, small, inference": variants.up_projection(
        tile=SMALL, dtype="bfloat16", activation="swiglu", interleaved=False, store_z=False, bias=False
    ),
    "dense, small": variants.down_projection(tile=SMALL, dtype="bfloat16", bias=False),
    "dense, ping-pong, cluster": variants.down_projection(tile=SQUARE, dtype="bfloat16", bias=False),
}
"""Both kernels, both sources of A, shared and ping-pong tiles, with and without a cluster, every part of the epilogue."""

SEEDS = range(3)
BLOCKS = 4
GRIDS = (BLOCKS, 64, 2)
"""Blocks by the seed: with 64 there are more than tiles, with 2 most tiles go by ticket."""

H, I, E = 136, 72, 7
LONG = 264
"""The reduction of the down-projection here: five stages and an end, more than the ring has, so that stages are used again."""
COUNTS = [5, 1, 0, 200, 64, 0, 130]
"""Rows an expert: a few, one, none, several tiles and a tail, exactly one block of 64 rows. H and I end within a stage and a tile."""


@pytest.fixture(scope="module")
def resources():
    return {name: cute_runtime.read_resources(emulator.compiled(variant).object) for name, variant in BUILT.items()}


def test_nothing_spills_to_local_memory(resources):
    for name, functions in resources.items():
        assert not any(function.uses_local_memory for function in functions), (name, functions)


def test_products_run_on_wgmma(resources):
    for name, (function,) in resources.items():
        assert function.hgmma >= 4, name


def test_registers_at_launch_fit_a_block(resources):
    for name, (function,) in resources.items():
        threads = TILES[BUILT[name].params["tile"]].threads
        assert function.registers * threads <= 65536, name


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles_of_the_table_obey_the_rules(tile):
    tile.check()
    for gather in (True, False):
        producers, consumers = tile.registers(gather=gather)
        assert producers + tile.consumers * consumers <= 512
        assert producers % 8 == consumers % 8 == 0


@pytest.mark.parametrize(
    ("tile", "rule"),
    [
        (Tile(m=128, n=256, stages=5), "bytes of shared memory: at most 232448"),
        (Tile(m=128, n=256, pingpong=True, stages=3), "256 accumulators leave too few registers"),
        (Tile(m=128, n=256, consumers=3), "each consumer needs whole blocks of 64 rows"),
        (Tile(m=192, n=128, consumers=3, pingpong=True), "ping-pong needs two consumers"),
        (Tile(m=64, n=128, consumers=1), "consumers=1: must be 2 or 3"),
        (Tile(m=128, n=160), "n=160: must be 128, 192 or 256"),
        (Tile(m=128, n=128, cluster=4), "cluster=4: must be 1 or 2"),
    ],
)
def test_a_tile_that_breaks_a_rule_is_refused_by_name(tile, rule):
    with pytest.raises(ValueError, match=f"^{tile.name}: .*{rule}"):
        tile.check()


H100, H200 = {"fast_memory": False}, {"fast_memory": True}
TOGETHER, APART = {"halves": False}, {"halves": True}


def test_tiles_follow_the_rows_of_an_expert():
    for store_z in (True, False):
        assert tiles.up_tile(rows=4096, experts=64, store_z=store_z, **H100, **TOGETHER) is WIDE
        assert tiles.up_tile(rows=32768, experts=256, store_z=store_z, **H100, **TOGETHER) is WIDE
        assert tiles.up_tile(rows=32768, experts=128, store_z=store_z, **H100, **TOGETHER) is PAIR
        assert tiles.up_tile(rows=262144, experts=128, store_z=store_z, **H100, **TOGETHER) is TALL
    assert tiles.down_tile(rows=4096, experts=64, reduced=1024, **H100) is WIDE
    assert tiles.down_tile(rows=32768, experts=256, reduced=1024, **H100) is WIDE
    assert tiles.down_tile(rows=32768, experts=128, reduced=1024, **H100) is BROAD
    assert tiles.down_tile(rows=262144, experts=128, reduced=1024, **H100) is TALL
    assert tiles.down_tile(rows=524288, experts=256, reduced=256, **H100) is BROAD


@pytest.mark.parametrize(("rows", "decoded"), [(8, SMALL), (8 * 128, SMALL), (8 * 128 + 1, WIDE)])
def test_few_rows_take_the_small_tile_in_inference(rows, decoded):
    assert tiles.up_tile(rows=rows, experts=128, store_z=False, **H100, **TOGETHER) is decoded
    assert tiles.up_tile(rows=rows, experts=128, store_z=True, **H100, **TOGETHER) is WIDE
    assert tiles.down_tile(rows=rows, experts=128, reduced=768, **H100) is decoded


def test_tiles_of_the_backward_follow_the_sizes():
    assert tiles.activation_backward_tile(rows=32768, experts=256, **H100) is WIDE
    assert tiles.activation_backward_tile(rows=32768, experts=128, **H100) is PAIR
    assert tiles.activation_backward_tile(rows=262144, experts=128, **H100) is LONE
    assert tiles.dx_tile(rows=32768, experts=256, **H100) is WIDE
    assert tiles.dx_tile(rows=262144, experts=128, **H100) is TALL
    assert tiles.weight_grad_tile() is TALL


@pytest.mark.parametrize(
    ("expert_rows", "up", "down", "back", "dx"),
    [
        (1, BROAD, SMALL, LONE, BROAD),
        (32, BROAD, SMALL, LONE, BROAD),
        (33, BROAD, BROAD, LONE, BROAD),
        (96, BROAD, BROAD, LONE, BROAD),
        (97, TALL, TALL, TALL, TALL),
        (160, TALL, TALL, TALL, TALL),
        (161, BROAD, BROAD, WIDE, BROAD),
        (264, BROAD, BROAD, WIDE, BROAD),
        (265, TALL, TALL, WIDE, TALL),
        (320, TALL, TALL, WIDE, TALL),
        (321, BROAD, BROAD, WIDE, BROAD),
        (447, BROAD, BROAD, WIDE, BROAD),
        (448, TALL, BROAD, LONE, BROAD),
        (2048, TALL, BROAD, LONE, BROAD),
    ],
)
def test_with_fast_memory_the_tile_is_the_one_that_the_rows_fill(expert_rows, up, down, back, dx):
    known = {"rows": expert_rows * 128, "experts": 128} | H200
    assert tiles.up_tile(**known, store_z=True, **TOGETHER) is up
    assert tiles.up_tile(**known, store_z=True, **APART) is TALL
    for layout in (TOGETHER, APART):
        assert tiles.up_tile(**known, store_z=False, **layout) is (
            SMALL if down is SMALL else tiles.up_tile(**known, store_z=True, **layout)
        )
    assert tiles.down_tile(**known, reduced=1024) is tiles.down_tile(**known, reduced=256) is down
    assert tiles.activation_backward_tile(**known) is back
    assert tiles.dx_tile(**known) is dx


@pytest.mark.parametrize(
    ("kilohertz", "bits", "fast"),
    [(2_619_000, 5120, False), (1_593_000, 5120, False), (2_619_000, 6144, True), (3_201_000, 6016, True)],
    ids=["H100 SXM", "H100 PCIe", "GH200, 96 GB", "H200"],
)
def test_fast_memory_is_told_by_the_devices_properties(monkeypatch, kilohertz, bits, fast):
    said = types.SimpleNamespace(memory_clock_rate=kilohertz, memory_bus_width=bits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: said)
    assert fast_memory.__wrapped__(torch.device("cuda", 0)) is fast


def test_prebuilt_variants_cover_the_tiles_of_the_rules():
    built = variants.prebuilt_variants()
    assert len(set(built)) == len(built)
    used = {variant.params["tile"] for variant in built if "tile" in variant.params}
    assert used == {tile.name for tile in (TALL, PAIR, BROAD, WIDE, LONE, SMALL)}


def routed(seed: int) -> DispatchPlan:
    """A plan with COUNTS rows an expert and sentinels, whose rows are tail."""
    expert = torch.repeat_interleave(torch.tensor([*range(E), -1, E]), torch.tensor([*COUNTS, 9, 3]))
    expert = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(seed))]
    made = plan(torch.arange(len(expert)) // 2, expert, num_tokens=len(expert) // 2, num_experts=E, slots_per_token=2)
    assert made.offsets.diff().tolist() == COUNTS
    return made


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_close_by_expert(got: torch.Tensor, want: torch.Tensor, offsets: torch.Tensor) -> None:
    """Each expert's rows within the rounding of got's dtype of the float64 values, the tail untouched."""
    bound = {torch.bfloat16: 3e-3, torch.float16: 5e-4}[got.dtype]
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        error = torch.linalg.norm(got[begin:end].double() - want[begin:end]) / torch.linalg.norm(want[begin:end]).clamp(min=1e-300)
        assert error < bound, (begin, end, error)
    assert got[int(offsets[-1]) :].isnan().all()


def down_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DispatchPlan]:
    own = routed(1)
    rows = len(own.row_to_token)
    a = random(rows, LONG, dtype=torch.bfloat16, seed=2)
    return a, random(E, H, LONG, dtype=torch.bfloat16, seed=3), random(E, H, dtype=torch.bfloat16, seed=4), own


def emulated_down(name: str, *, blocks: int = BLOCKS, dependent: int = 0, tickets: torch.Tensor | None = None, **options) -> torch.Tensor:
    a, w_down, b_down, own = down_inputs()
    y = poisoned(len(a), H, dtype=a.dtype)
    bias = b_down if BUILT[name].params["bias"] else None
    tickets = own.tickets if tickets is None else tickets
    emulator.launch(BUILT[name], a, w_down, bias, own.offsets, tickets, y, blocks, dependent, **options)
    return y


@pytest.mark.parametrize("name", [name for name in BUILT if "dense" in name])
def test_emulated_down_projection_has_float64s_values_in_every_order(name):
    a, w_down, b_down, own = down_inputs()
    want = reference.down_projection(a.double(), w_down.double(), b_down.double() if BUILT[name].params["bias"] else None, own)
    tickets, orders = torch.zeros(TICKETS, dtype=torch.int32), zip(SEEDS, GRIDS, strict=True)
    first, *others = (emulated_down(name, seed=seed, blocks=blocks, dependent=seed % 2, tickets=tickets) for seed, blocks in orders)
    assert not tickets.any()
    assert_close_by_expert(first, want, own.offsets)
    for other in others:
        assert torch.equal(first.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("name", [name for name in BUILT if "dense" in name])
@pytest.mark.parametrize("blocks", [2, 64])
def test_no_tile_is_computed_twice(name, blocks):
    """A counter that nobody resets ends at one ticket a cluster and one a tile begun: as many are begun as there are, and as the values
    are right, each of them. The next launch then leaves tiles out."""
    tile, tickets = TILES[BUILT[name].params["tile"]], torch.zeros(TICKETS, dtype=torch.int32)
    count = sum(-(-rows // (tile.m * tile.cluster)) for rows in COUNTS) * -(-H // tile.n)
    emulated_down(name, blocks=blocks, tickets=tickets, edit=without(RESET))
    assert tickets.tolist() == [0, blocks // tile.cluster + count, *[0] * (TICKETS - 2)]
    assert emulated_down(name, blocks=2, tickets=tickets)[: sum(COUNTS)].isnan().any()


def test_tickets_run_through_more_experts_than_a_warp_holds():
    counts = torch.arange(70) % 3
    offsets = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()))
    a, w_down = random(len(offsets), 64, dtype=torch.bfloat16, seed=0), random(70, 128, 64, dtype=torch.bfloat16, seed=1)
    owner, tickets = torch.repeat_interleave(counts), torch.zeros(TICKETS, dtype=torch.int32)
    want = torch.einsum("rk,rnk->rn", a[: len(owner)].double(), w_down.double()[owner])
    for edit in (None, without(RESET)):
        y = poisoned(len(a), 128, dtype=a.dtype)
        emulator.launch(BUILT["dense, small"], a, w_down, None, offsets, tickets, y, BLOCKS, 0, edit=edit)
        assert_close_by_expert(y, want, offsets)
        assert tickets.tolist() == [0, 0 if edit is None else BLOCKS + int((counts > 0).sum()), *[0] * (TICKETS - 2)]


@pytest.mark.parametrize("name", [name for name in BUILT if "gathered" in name])
def test_emulated_up_projection_has_float64s_values_in_every_order(name):
    params, own = BUILT[name].params, routed(5)
    dtype = getattr(torch, params["dtype"])
    x = random(own.num_tokens, H, dtype=dtype, seed=6)
    w_up = random(E, 2 * I, H, dtype=dtype, seed=7) / 8
    b_up = random(E, 2 * I, dtype=dtype, seed=8) if params["bias"] else None
    layout = "interleaved" if params["interleaved"] else "concatenated"
    want = reference.up_projection(
        *(None if tensor is None else tensor.double() for tensor in (x, w_up, b_up)),
        own,
        activation=params["activation"],
        gate_up_layout=layout,
        store_z=True,
    )
    results = []
    for seed, blocks in zip(SEEDS, GRIDS, strict=True):
        a = poisoned(len(own.row_to_token), I, dtype=dtype)
        z = poisoned(len(own.row_to_token), 2 * I, dtype=dtype) if params["store_z"] else None
        emulator.launch(BUILT[name], x, w_up, b_up, own.offsets, own.tickets, own.row_to_token, a, z, blocks, seed=seed)
        assert not own.tickets.any()
        results.append((a, z) if params["store_z"] else (a,))
    for got, exact in zip(results[0], want[: len(results[0])], strict=True):
        assert_close_by_expert(got, exact, own.offsets)
    for result in results[1:]:
        assert all(torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", [name for name in BUILT if "dense" in name])
def test_a_dependent_down_projection_reads_weights_before_the_launch_before_has_ended_and_nothing_else(name):
    """That launch may therefore write a, and must not write the weights; a block without a tile waits for it too."""
    a, w_down, b_down, own = down_inputs()
    bias = b_down if BUILT[name].params["bias"] else None

    def launch(written: torch.Tensor, dependent: int, blocks: int = BLOCKS) -> None:
        own_region = Region(written.data_ptr(), written.nbytes, "written before")
        history = [Written(own_region, np.ones_like(own_region.marks()))]
        y = poisoned(len(a), H, dtype=a.dtype)
        emulator.launch(BUILT[name], a, w_down, bias, own.offsets, own.tickets, y, blocks, dependent, history=history)

    launch(a, 1)
    launch(a, 1, blocks=64)
    launch(w_down, 0)
    with pytest.raises(
        emulator.EmulationError, match=r"reads argument 1 .*, which the launch before writes, without a griddepcontrol.wait"
    ):
        launch(w_down, 1)


def test_emulator_counts_products_and_bytes_of_each_role():
    """One expert of 200 rows: four blocks of 64 rows, of which the last tile's second is not there, by one tile of 192 columns."""
    offsets, reduced = torch.tensor([0, 200], dtype=torch.int32), 128
    a, w = random(200, reduced, dtype=torch.bfloat16, seed=0), random(1, 192, reduced, dtype=torch.bfloat16, seed=1)
    b, y = random(1, 192, dtype=torch.bfloat16, seed=2), poisoned(200, 192, dtype=torch.bfloat16)
    (statistics,) = emulator.launch(BUILT["dense, ping-pong, bias"], a, w, b, offsets, torch.zeros(TICKETS, dtype=torch.int32), y, 1, 0)
    assert statistics.products == 2 * 128 * 192 * reduced  # whole tiles
    assert statistics.bytes_loaded == 2 * (128 + 192) * reduced * 2
    assert statistics.bytes_stored == 192 * 192 * 2  # the three blocks of 64 rows that are whole
    assert statistics.warp_instructions[1] < statistics.warp_instructions[0] < statistics.instructions


TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\], [%r\d]+, 10000000;"


def without(pattern: str, number: int | None = None, instead: str = "") -> Callable[[str], str]:
    """An edit that replaces all matches of a pattern, or the given one."""

    def edit(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        chosen = matches if number is None else [matches[number]]
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + instead + ptx[match.end() :]
        return ptx

    return edit


RESET = r"st\.global\.b32\s+\[%rd\d+(\+\d+)?\], 0;"
"""Of the counter of tiles, the only plain store of a zero."""


def without_wait(number: int, before: str) -> Callable[[str], str]:
    """Takes away the ``number``-th last wait before the first ``before``."""

    def edit(ptx: str) -> str:
        waits = list(re.finditer(TRY_WAIT, ptx[: ptx.index(before)]))
        return ptx[: waits[-number].start()] + "setp.eq.u32 P1, 0, 0;" + ptx[waits[-number].end() :]

    return edit


before_wgmma = without_wait(1, "wgmma.fence")
"""The wait for the stage."""

DEFECTS = {
    "no wait before the products": (before_wgmma, "race: wgmma reads shared memory .* that bulk load of warp 0"),
    "stage given back before its products are done": (
        without(r"wgmma\.wait_group\.sync\.aligned\s+1;"),
        "race: a bulk load writes shared memory .* that wgmma of warp",
    ),
    "accumulators read before they are there": (
        without(r"wgmma\.wait_group\.sync\.aligned\s+0;"),
        "written by a wgmma that was not waited",
    ),
    "no wgmma.fence": (without(r"wgmma\.fence\.sync\.aligned;"), "wgmma without any wgmma.fence"),
    "no fence before a store": (without(r"fence\.proxy\.async\.shared::cta;"), "proxy: a bulk store reads shared memory"),
    "buffer written before its store has read it": (without(r"cp\.async\.bulk\.wait_group\.read\s+\d;"), "that bulk store of warp"),
    "no turns": (without(r"bar\.sync\s+%r\d+, 256;"), "race: wgmma reads shared memory|deadlock"),
    "a stage expects too few bytes": (without("40960, 24576", instead="40952, 24568"), "deadlock|race"),
}


def one_more_arrival(ptx: str) -> str:
    """The barriers of released stages wait for five warps, of which there are four."""
    count = re.search(r"mov\.b32\s+%r\d+, 4;(?=\s+mbarrier\.init)", ptx)
    return ptx[: count.end() - 2] + "5;" + ptx[count.end() :]


DEFECTS["one arrival too many is awaited"] = (one_more_arrival, r"deadlock: [\s\S]*mbarrier at 0x4\d\d, phase 0: 1 of 5 arrivals")


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defect_is_caught_whatever_the_order(defect):
    edit, message = DEFECTS[defect]
    for seed in SEEDS:
        with pytest.raises(emulator.EmulationError, match=message):
            emulated_down("dense, ping-pong, bias", edit=edit, seed=seed)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "race: reads shared memory at .* that st.async of warp 0 "),
        (1, "race: st.async writes shared memory at .* that warp 0 .* reads"),
    ],
    ids=["read before it has come", "sent before the one before it was read"],
)
def test_a_ticket_of_a_cluster_waits_in_both_blocks(number, message):
    for seed in SEEDS:
        with pytest.raises(emulator.EmulationError, match=message):
            emulated_down("dense, ping-pong, cluster", edit=without_wait(number, "st.async"), seed=seed, blocks=2)


def test_missing_wait_shows_without_the_checks_too():
    """With the checks of order switched off, the adversarial order alone gives wrong values, or a deadlock, with some seed."""
    a, w_down, b_down, own = down_inputs()
    want = reference.down_projection(a.double(), w_down.double(), b_down.double(), own)[: int(own.offsets[-1])]
    wrong = []
    for seed in range(4):
        try:
            y = emulated_down("dense, ping-pong, bias", edit=before_wgmma, seed=seed, check_races=False)
        except emulator.EmulationError as error:
            wrong.append("deadlock" in str(error))
        else:
            wrong.append(not torch.linalg.norm(y[: len(want)].double() - want) < 3e-3 * torch.linalg.norm(want))
    assert any(wrong)


def test_gathered_rows_need_their_proxy_fence():
    """cp.async writes through the generic proxy, wgmma reads through the async one."""
    name, own = "gathered, interleaved, z and bias", routed(5)
    x, w_up = random(own.num_tokens, H, dtype=torch.bfloat16, seed=6), random(E, 2 * I, H, dtype=torch.bfloat16, seed=7)
    b_up, rows = random(E, 2 * I, dtype=torch.bfloat16, seed=8), len(own.row_to_token)
    outputs = poisoned(rows, I, dtype=torch.bfloat16), poisoned(rows, 2 * I, dtype=torch.bfloat16)
    fences = without(r"fence\.proxy\.async\.shared::cta;", 0)
    with pytest.raises(emulator.EmulationError, match=r"proxy: wgmma reads shared memory at .* that cp.async of warp [123] .* wrote"):
        emulator.launch(BUILT[name], x, w_up, b_up, own.offsets, own.tickets, own.row_to_token, *outputs, BLOCKS, edit=fences)


def test_output_that_is_too_small_is_an_error_that_names_it():
    a, w_down, b_down, own = down_inputs()
    offsets = own.offsets + torch.tensor([0] * E + [30], dtype=torch.int32)  # more rows than there are
    y = poisoned(len(a), H, dtype=a.dtype)
    with pytest.raises(
        emulator.EmulationError, match=r"writes 16 bytes of global memory at .* the nearest is argument 5 \(bfloat16, shape"
    ):
        emulator.launch(BUILT["dense, ping-pong, bias"], a, w_down, b_down, offsets, own.tickets, y, BLOCKS, 0)
