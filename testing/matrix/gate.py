"""Merges shards' results and decides.

A merge is good when every cell of the matrix was run and passes by the thresholds in the matrix file now. A cell that no
result mentions fails the gate. A cell that was not run for want of a GPU is listed as not run: under the cpu profile that
is what was promised and does not fail the gate; under any other profile it does, unless it needs several GPUs, which the
runners of the shards do not have. A speed cell without a recorded threshold is listed as "no threshold yet": it does not
fail, and it is not counted as passed.
"""

from pathlib import Path
from typing import Any, NamedTuple

from testing.matrix.cells import Cell, Matrix, Profile
from testing.matrix.describe import describe, not_run_reason
from testing.matrix.judge import finish
from testing.matrix.located import MatrixError
from testing.matrix.plan import profile_of
from testing.matrix.results import FAILED, NO_FLOOR, NOT_RUN, PASSED, read_result
from testing.matrix.speed import Machine

MISSING = "missing"


class Verdict(NamedTuple):
    """What the gate decided."""

    passed: bool
    reasons: list[str]
    """One line per cell that fails the gate."""
    merged: dict[str, Any]
    """One result with every cell of the matrix, judged anew; cells without a result have the status "missing"."""

    def count(self, status: str) -> int:
        return sum(cell["status"] == status for cell in self.merged["cells"])


def decide(matrix: Matrix, paths: list[Path], expect_profile: str | None = None) -> Verdict:
    """Judge the results in `paths` together.

    Raises:
        MatrixError: a file is unreadable, results of different profiles or sources are mixed, a cell comes twice or is
            unknown, or the profile is not the expected one.
    """
    results = [(path, read_result(path)) for path in paths]
    if not results:
        raise MatrixError("gate: no result was given")
    first_path, first = results[0]
    for path, result in results:
        for key in ("profile", "sources"):
            if result[key] != first[key]:
                raise MatrixError(f"{path}: has {key} {result[key]}, but {first_path} has {first[key]}; results must come from one run")
        if expect_profile is not None and result["profile"] != expect_profile:
            raise MatrixError(f"{path}: was run with the profile {result['profile']}, expected {expect_profile}")
    found = _merge(matrix, results)
    profile = profile_of(matrix, first["profile"])
    cells, reasons = [], []
    for cell in matrix.cells:
        judged = _judge(matrix, cell, *found.get(cell.name, (None, None)), profile)
        cells.append(judged)
        promised = judged["status"] == NOT_RUN and (profile.name == "cpu" or cell.gpus > 1)
        if judged["status"] not in (PASSED, NO_FLOOR) and not promised:
            reasons.append(f"{cell.name}: {judged['status']}: {judged['why']}")
    keep = {key: value for key, value in first.items() if key not in ("cells", "shard", "seconds", "jobs", "command")}
    merged = {
        **keep,
        "seed": sorted({result["seed"] for _, result in results}),
        "shards": [result["shard"] for _, result in results],
        "seconds": sum(result.get("seconds", 0.0) for _, result in results),
        "cells": cells,
    }
    return Verdict(not reasons, reasons, merged)


def _merge(matrix: Matrix, results: list[tuple[Path, dict[str, Any]]]) -> dict[str, tuple[dict[str, Any], Machine]]:
    """Cell name -> its result and where that was measured."""
    known = {cell.name for cell in matrix.cells}
    found: dict[str, tuple[dict[str, Any], Machine]] = {}
    origin: dict[str, Path] = {}
    for path, result in results:
        for cell in result["cells"]:
            name = cell["name"]
            if name not in known:
                raise MatrixError(f"{path}: cell {name} is not in {matrix.path}")
            if name in found:
                raise MatrixError(f"{path}: cell {name} is in {origin[name]} too")
            found[name], origin[name] = (cell, Machine.of(result)), path
    return found


def _judge(matrix: Matrix, cell: Cell, result: dict[str, Any] | None, machine: Machine | None, profile: Profile) -> dict[str, Any]:
    """A recorded verdict is not trusted: the numbers are compared with the thresholds again."""
    if result is None:
        return {**describe(cell, profile), "status": MISSING, "passed": False, "why": "no result has this cell"}
    if result["status"] == NOT_RUN:
        reason = not_run_reason(cell, gpus=0)
        if reason:
            return {**result, "passed": None, "why": reason}
        return {**result, "status": FAILED, "passed": False, "why": f"was not run, and needs no GPU: {result.get('why', '')}"}
    for key, wanted in describe(cell, profile).items():
        if result.get(key) != wanted:
            return {**result, "status": FAILED, "passed": False, "why": f"was run with {key} {result.get(key)}, the matrix says {wanted}"}
    return finish(cell, result, matrix, machine)
