"""What a worker does with a cell: run its checks on this machine's device and measure its time and memory."""

import gc
import os
import resource
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from testing.matrix import pool
from testing.matrix.cells import Cell, CountCell, LayerCell, ParallelCell, Profile, RoutingCell, SpeedCell, load_matrix
from testing.matrix.checks_dispatch import check_counts
from testing.matrix.checks_layer import measure_layer
from testing.matrix.checks_parallel import measure_parallel
from testing.matrix.checks_speed import measure_speed
from testing.matrix.route import check_route
from testing.matrix.speed import Rule


def prepare(matrix_path: Path, profile_name: str, device: str) -> pool.Work:
    """Load the matrix once per worker; the returned function runs one cell by name."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    matrix = load_matrix(matrix_path)
    profile = matrix.profiles[profile_name]
    cells = {cell.name: cell for cell in matrix.cells}

    def work(name: str, seed: int) -> dict[str, Any]:
        return run_cell(cells[name], profile, seed, device, matrix.speed_rule)

    return work


def run_cell(cell: Cell, profile: Profile, seed: int, device: str, rule: Rule) -> dict[str, Any]:
    """Measure one cell. An exception is a result too: the cell fails with its type and message."""
    started = time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        measured = _run(cell, profile, seed, device, rule)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        measured = {"crash": f"{type(error).__name__}: {lines[0]}", "traceback": traceback.format_exc(limit=-8)}
    used = {"seconds": round(time.perf_counter() - started, 3), "peak_mib": round(_peak_mib(device))}
    return {**used, **measured, **(_clean_up() if device == "cuda" else {})}


def _clean_up() -> dict[str, Any]:
    """Give the GPU's memory back, which other workers share; where an error has broken this process's use of the GPU, say so."""
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return {pool.LOST: True}
    return {}


def _run(cell: Cell, profile: Profile, seed: int, device: str, rule: Rule) -> dict[str, Any]:
    if isinstance(cell, LayerCell):
        return measure_layer(cell, profile, seed, device)
    if isinstance(cell, RoutingCell):
        return {"checks": _as_dicts(check_route(cell.routing, cell.load, cell.tokens, cell.experts, cell.per_token, seed, device))}
    if isinstance(cell, CountCell):
        return {"checks": _as_dicts(check_counts(cell, seed, device))}
    if isinstance(cell, ParallelCell):
        return measure_parallel(cell, profile, seed)
    if isinstance(cell, SpeedCell):
        return measure_speed(cell, seed, rule)
    raise TypeError(f"{type(cell).__name__}: this kind of cell cannot be run")


def _as_dicts(checks: Any) -> list[dict[str, Any]]:
    return [check._asdict() for check in checks]


def _peak_mib(device: str) -> float:
    """Device memory of the cell where there is a device, else the largest resident size of this worker so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
