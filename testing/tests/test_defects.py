"""The matrix tests the tests: every planted defect fails its cell, and the same cells pass without one."""

from dataclasses import replace

import pytest

from testing.matrix.cells import CountCell, Limits, load_matrix
from testing.matrix.defects import DEFECTS, planted
from testing.matrix.execute import run_cell
from testing.matrix.judge import judge_cell

MATRIX = load_matrix()
LIMITS = Limits(routed_rows=1024, weight_elements=300_000, min_intermediate=32, tile_m=16)
PROFILE = replace(MATRIX.profiles["cpu"], limits=LIMITS)


def problems_of(name: str) -> list[str]:
    """Run one cell, made small, and say what is wrong with it."""
    cell = next(cell for cell in MATRIX.cells if cell.name == name)
    if isinstance(cell, CountCell):
        cell = replace(cell, lengths=(0,), powers=(4, 10), random_lengths=2)
    else:
        tokens = cell.thiek.T if cell.counts else min(cell.thiek.T, 1000)
        cell = replace(cell, thiek=cell.thiek._replace(T=tokens, H=64, I=32))
    result = run_cell(cell, PROFILE, seed=5, device="cpu")
    assert "crash" not in result, result
    return judge_cell(cell, result, MATRIX)


@pytest.mark.parametrize("name", sorted({defect.cell for defect in DEFECTS.values()}))
def test_correct_code_passes(name):
    assert problems_of(name) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name):
    with planted(name) as defect:
        assert problems_of(defect.cell)
