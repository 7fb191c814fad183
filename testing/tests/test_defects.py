"""The matrix tests the tests: every planted defect fails its cell, and the same cells pass without one.

The cells are made small; `python -m testing.matrix selftest` plants the same defects in the real ones, through workers and gate.
"""

from dataclasses import replace

import pytest

from testing.matrix.cells import CountCell, LayerCell, Limits, RoutingCell, load_matrix
from testing.matrix.defects import DEFECTS
from testing.matrix.execute import run_cell
from testing.matrix.judge import judge_cell
from testing.matrix.planting import Registry, planted
from testing.matrix.speed import Machine

MATRIX = load_matrix()
LIMITS = Limits(routed_rows=1024, weight_elements=300_000, min_intermediate=32, tile_m=16)
PROFILE = replace(MATRIX.profiles["cpu"], limits=LIMITS)


def problems_of(name: str) -> list[str]:
    """Run one cell, made small, and say what is wrong with it."""
    cell = next(cell for cell in MATRIX.cells if cell.name == name)
    if isinstance(cell, CountCell):
        # 65536 ids of one expert and more are what a count of 16 bits cannot hold.
        cell = replace(cell, lengths=(0, 300_000) if name == "count/e4" else (0,), powers=(4, 10), random_lengths=2)
    elif isinstance(cell, LayerCell):
        sizes = cell.thiek._replace(T=cell.thiek.T if cell.counts else min(cell.thiek.T, 1000), H=72, I=32)
        cell = replace(cell, thiek=sizes, repeats=cell.repeats and 60)
    elif isinstance(cell, RoutingCell):
        cell = replace(cell, tokens=9000)  # more than 65536 rows
    result = run_cell(cell, PROFILE, seed=5, device="cpu", rule=MATRIX.speed_rule)
    assert "crash" not in result, result
    return judge_cell(cell, result, MATRIX, Machine(None, None))


@pytest.mark.parametrize("name", sorted({defect.cell for defect in DEFECTS.values()}))
def test_correct_code_passes(name):
    assert problems_of(name) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name):
    with planted(DEFECTS[name]):
        assert problems_of(DEFECTS[name].cell)


def test_the_right_function_is_back_after_a_defect():
    from sonicmoe.backends import reference

    right = reference.up_projection
    with planted(DEFECTS["gate and up swapped"]):
        assert reference.up_projection is not right
    assert reference.up_projection is right


def test_two_defects_of_one_name_are_refused():
    registry = Registry()
    registry.add("one", "routing", "top_k", "loads/ties")(lambda right: right)
    with pytest.raises(ValueError, match="defect 'one': was already given"):
        registry.add("one", "routing", "top_k", "loads/ties")(lambda right: right)
