"""Plans: what is cut, what it costs, and shards that are balanced, stable and complete."""

from dataclasses import replace

import pytest

from sonicmoe.thiek import Thiek
from testing.matrix import plan
from testing.matrix.cells import MatrixError, RoutingSpec, load_matrix


@pytest.fixture(scope="module")
def matrix():
    return load_matrix()


def cell_named(matrix, name):
    return next(cell for cell in matrix.cells if cell.name == name)


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_shards_hold_every_cell_once(matrix, count):
    shards = plan.make_shards(matrix.cells, matrix.profiles["hopper"], count)
    names = [cell.name for shard in shards for cell in shard.cells]
    assert sorted(names) == sorted(cell.name for cell in matrix.cells)
    assert all(shard.cells for shard in shards)


def test_shards_are_the_same_however_often_and_in_whatever_order_they_are_planned(matrix):
    profile = matrix.profiles["cpu"]
    once, again = plan.make_shards(matrix.cells, profile, 5), plan.make_shards(matrix.cells[::-1], profile, 5)
    assert [{cell.name for cell in shard.cells} for shard in once] == [{cell.name for cell in shard.cells} for shard in again]


def test_shards_are_balanced(matrix):
    for profile in matrix.profiles.values():
        costs = [shard.cost_s for shard in plan.make_shards(matrix.cells, profile, 4)]
        assert max(costs) < 1.1 * sum(costs) / len(costs)


@pytest.mark.parametrize("count", [0, -1, 1000])
def test_impossible_shard_counts_are_refused(matrix, count):
    with pytest.raises(MatrixError, match=rf"--shards {count}: must be from 1 to the \d+ cells"):
        plan.make_shards(matrix.cells, matrix.profiles["cpu"], count)


def test_a_pattern_that_matches_nothing_is_refused(matrix):
    assert {cell.name.split("/")[0] for cell in plan.select(matrix, "models/*")} == {"models"}
    with pytest.raises(MatrixError, match="--cells nothing: matches none"):
        plan.select(matrix, "nothing")


def test_github_matrix_lists_one_entry_per_shard(matrix):
    entries = plan.github_matrix(plan.make_shards(matrix.cells, matrix.profiles["cpu"], 3))["include"]
    assert [entry["shard"] for entry in entries] == ["1/3", "2/3", "3/3"]
    assert sum(entry["cells"] for entry in entries) == len(matrix.cells)


def test_the_hopper_profile_keeps_sizes_that_fit(matrix):
    limits = matrix.profiles["hopper"].limits
    cell = cell_named(matrix, "models/qwen3-30b-a3b")
    assert not plan.experts_problem(cell, limits).is_cut(cell)
    big = cell_named(matrix, "models/deepseek-v3")
    cut = plan.experts_problem(big, limits).thiek
    assert cut._replace(E=256) == big.thiek
    assert 8 * 4 <= cut.E < 256


def test_every_cut_problem_is_valid_and_within_its_limits(matrix):
    limits = matrix.profiles["cpu"].limits
    for cell in matrix.cells_of("layer"):
        sizes, routing = plan.experts_problem(cell, limits)
        assert sizes.H == cell.thiek.H
        assert sizes.K == cell.thiek.K
        assert sizes.I % 16 == cell.thiek.I % 16
        assert all(small <= full for small, full in zip(sizes, cell.thiek, strict=True))
        assert sizes.E % routing.num_groups == 0
        assert sizes.E // routing.num_groups * routing.groups_per_token >= min(cell.thiek.E, 2 * sizes.K) or (sizes.E == cell.thiek.E)
        if cell.counts is None:
            assert limits.routed_rows >= sizes.T * sizes.K


def test_cutting_keeps_partial_tiles_partial(matrix):
    cell = replace(cell_named(matrix, "experts/e8"), thiek=Thiek(8193, 1024, 520, 8, 2))
    sizes = plan.experts_problem(cell, matrix.profiles["cpu"].limits).thiek
    assert sizes.T % 128 == 1
    assert sizes.I % 16 == 8


def test_cutting_a_rounded_cell_cuts_its_tile_and_nothing_else_of_its_routing(matrix):
    cell = cell_named(matrix, "rounding/nearest")
    routing: RoutingSpec = plan.experts_problem(cell, matrix.profiles["cpu"].limits).routing
    assert routing == replace(cell.routing, tile_m=16)


def test_the_hopper_run_is_planned_to_stay_below_eight_minutes(matrix):
    """By estimates (docs/gate.md), even where every speed cell needs three times as many trials, the most that there are."""
    profile = matrix.profiles["hopper"]
    speed = sum(plan.cost_seconds(cell, profile) for cell in matrix.cells_of("speed"))
    assert plan.estimated_wall_seconds(matrix.cells, profile, workers=4) + 2 * speed < 480


def test_the_estimate_counts_workers_and_memory(matrix, monkeypatch):
    cells = matrix.cells_of("routing")[:3] + matrix.cells_of("speed")[:2]
    profile = matrix.profiles["hopper"]
    costs = dict(zip([cell.name for cell in cells], (8.0, 5.0, 4.0, 10.0, 10.0), strict=True))
    monkeypatch.setattr(plan, "cost_seconds", lambda cell, profile: costs[cell.name])
    monkeypatch.setattr(plan, "memory_bytes", lambda cell, profile: 20 * 2**30)
    start = 2 * plan._START_S + 20
    assert plan.estimated_wall_seconds(cells, profile, workers=1) == start + 17
    assert plan.estimated_wall_seconds(cells, profile, workers=2) == start + 9
    assert plan.estimated_wall_seconds(cells, profile, workers=3) == start + 8
    monkeypatch.setattr(plan, "memory_bytes", lambda cell, profile: 40 * 2**30)
    assert plan.estimated_wall_seconds(cells, profile, workers=3) == start + 17
