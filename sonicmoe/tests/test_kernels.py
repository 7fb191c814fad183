"""The expert GEMMs without a GPU: tiles obey their rules, and one variant of each kind is built for sm_90a and read back."""

import pytest

import cute_runtime
from sonicmoe.kernels import tiles, variants
from sonicmoe.kernels.tiles import BROAD, PAIR, SQUARE, TALL, TILES, Tile

BUILT = {
    "gathered, interleaved, z and bias": variants.up_projection(
        tile=TALL, dtype="bfloat16", activation="swiglu", interleaved=True, store_z=True, bias=True
    ),
    "gathered, concatenated, cluster, fp16": variants.up_projection(
        tile=PAIR, dtype="float16", activation="geglu", interleaved=False, store_z=True, bias=False
    ),
    "dense, ping-pong, bias": variants.down_projection(tile=BROAD, dtype="bfloat16", bias=True),
}
"""Both kernels, both sources of A, shared and ping-pong tiles, every part of the epilogue."""


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return {name: cute_runtime.read_resources(cute_runtime.build(variant, out)) for name, variant in BUILT.items()}


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


def test_tiles_follow_the_rows_of_an_expert():
    assert tiles.up_tile(rows=32768, experts=256) is TALL
    assert tiles.up_tile(rows=32768, experts=128) is PAIR
    assert tiles.up_tile(rows=262144, experts=128) is TALL
    assert tiles.down_tile(rows=32768, experts=256, reduced=1024) is TALL
    assert tiles.down_tile(rows=32768, experts=128, reduced=1024) is BROAD
    assert tiles.down_tile(rows=262144, experts=128, reduced=1024) is SQUARE
    assert tiles.down_tile(rows=524288, experts=256, reduced=256) is BROAD


def test_prebuilt_variants_cover_the_table():
    built = variants.prebuilt_variants()
    assert len(set(built)) == len(built) == 11
    assert {variant.params["tile"] for variant in built} == set(TILES)
