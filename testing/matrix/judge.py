"""When a cell passes. The worker measures, this judges, and the gate judges again with the thresholds of the day."""

import math
from typing import Any, NamedTuple

from testing.matrix.cells import Cell, LayerCell, Matrix, ParallelCell, Threshold
from testing.matrix.results import FAILED, NO_FLOOR, PASSED
from testing.matrix.speed import Machine, floor_of, judge_speed


def judge_errors(errors: dict[str, dict[str, float | None]], thresholds: dict[str, Threshold]) -> list[str]:
    """Every way in which measured errors exceed their thresholds, in words. What is not a finite number never passes."""
    problems = []
    for tensor, measured in errors.items():
        for scope in Threshold._fields:
            value, limit = measured.get(scope), getattr(thresholds[tensor], scope)
            if not _is_finite(value):
                problems.append(f"{tensor} {scope} is not finite")
            elif value > limit:
                problems.append(f"{tensor} {scope} {value:.2e} > {limit:.1e}")
    return problems


def expected_tensors(cell: LayerCell | ParallelCell) -> list[str]:
    """The tensors whose errors a layer cell must report."""
    biases = ["db_up", "db_down"] if cell.bias else []
    return ["o", "dx", "dw_up", "dw_down", *biases, "drouter"]


def judge_cell(cell: Cell, result: dict[str, Any], matrix: Matrix, machine: Machine) -> list[str]:
    """Every reason why a cell that ran fails: its own failure, a check, an error, or a measurement that is missing."""
    problems = []
    if result.get("crash"):
        return [str(result["crash"])]
    checks = result.get("checks", [])
    problems += [f"{item['name']}: {item['why']}" for item in checks if item.get("passed") is not True]
    if isinstance(cell, LayerCell | ParallelCell):
        errors = result.get("errors") or {}
        missing = [tensor for tensor in expected_tensors(cell) if tensor not in errors]
        problems += [f"{tensor} was not measured" for tensor in missing]
        known = {tensor: errors[tensor] for tensor in errors if tensor in matrix.thresholds[cell.dtype]}
        problems += judge_errors(known, matrix.thresholds[cell.dtype])
    elif cell.kind == "speed":
        missing = [key for key in ("ms", "bound_ms", "ratio", "tflops", "trials") if not _is_positive(result.get(key))]
        missing += [key for key in ("ms_spread", "ratio_spread") if not _is_finite(result.get(key))]
        problems += [f"{key} was not measured" for key in missing]
        if not missing:
            problems += [loss.why for loss in judge_speed(result, matrix.floors, matrix.speed_rule, machine)]
    if not checks and cell.kind != "speed":
        problems.append("nothing was checked")
    return problems


def finish(cell: Cell, result: dict[str, Any], matrix: Matrix, machine: Machine) -> dict[str, Any]:
    """The result with its verdict: status, passed and why. `machine` is where it was measured."""
    problems = judge_cell(cell, result, matrix, machine)
    if not problems and cell.kind == "speed" and floor_of(matrix.floors, cell.name, machine) is None:
        return {**result, "status": NO_FLOOR, "passed": None, "why": "no recorded run has set its threshold"}
    return {**result, "status": FAILED if problems else PASSED, "passed": not problems, "why": "; ".join(problems)}


class Worst(NamedTuple):
    """The largest error of a cell as a share of its limit: 1 is the edge, above fails, infinite is not finite."""

    tensor: str
    scope: str
    share: float


def worst_error(cell: LayerCell, result: dict[str, Any], matrix: Matrix) -> Worst | None:
    """The error nearest to its limit, or farthest above; None where nothing was measured."""
    found, thresholds = [], matrix.thresholds[cell.dtype]
    known = {tensor: measured for tensor, measured in (result.get("errors") or {}).items() if tensor in thresholds}
    for tensor, measured in known.items():
        for scope in Threshold._fields:
            value = measured.get(scope)
            share = value / getattr(thresholds[tensor], scope) if _is_finite(value) else math.inf
            found.append(Worst(tensor, scope, share))
    return max(found, key=lambda worst: worst.share, default=None)


def worst_share(cell: LayerCell, result: dict[str, Any], matrix: Matrix) -> float | None:
    """The share of `worst_error`."""
    worst = worst_error(cell, result, matrix)
    return None if worst is None else worst.share


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0
