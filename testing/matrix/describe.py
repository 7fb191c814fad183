"""What is known of a cell before it runs: its words in results and tables, its seed, and whether it can run here."""

import hashlib
from typing import Any

from testing.matrix.cells import Cell, CountCell, LayerCell, ParallelCell, Profile, RoutingCell, SpeedCell
from testing.matrix.plan import experts_problem

NEEDS_GPU = "needs an sm_90 GPU"


def not_run_reason(cell: Cell, *, gpus: int) -> str:
    """Why a cell cannot run on a machine with so many sm_90 GPUs; empty when it can."""
    if cell.gpus <= gpus:
        return ""
    return NEEDS_GPU if cell.gpus == 1 else f"needs {cell.gpus} sm_90 GPUs"


def cell_seed(run_seed: int, name: str) -> int:
    """A seed of its own for each cell, the same whatever else runs and on however many shards."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:4], "big")


def split_of(cell: ParallelCell) -> tuple[int, ...]:
    """Tokens of each process."""
    tokens, processes = cell.thiek.T, cell.processes
    return cell.split or tuple(tokens * (rank + 1) // processes - tokens * rank // processes for rank in range(processes))


def describe(cell: Cell, profile: Profile) -> dict[str, Any]:
    """The fields of a cell's result that do not depend on running it."""
    words: dict[str, Any] = {"name": cell.name, "kind": cell.kind}
    if isinstance(cell, LayerCell):
        problem = experts_problem(cell, profile.limits)
        words |= {
            "thiek": list(cell.thiek),
            "thiek_experts": list(problem.thiek),
            "routing": cell.routing.name,
            "load": "counts" if cell.counts else cell.load,
            "dtype": cell.dtype,
            "mode": "forward+backward",
            "activation": cell.activation,
            "layout": cell.layout,
            "bias": cell.bias,
            "sentinels": cell.sentinels,
        }
        if cell.repeats:
            words["repeats"] = cell.repeats
        if problem.routing.tile_m != cell.routing.tile_m:
            words["tile_m_experts"] = problem.routing.tile_m
    elif isinstance(cell, RoutingCell):
        thiek = [cell.tokens, None, None, cell.experts, cell.per_token]
        words |= {"thiek": thiek, "routing": cell.routing.name, "load": cell.load, "dtype": "fp32", "mode": "routing"}
    elif isinstance(cell, CountCell):
        words |= {"thiek": [None, None, None, cell.experts, None], "routing": None, "dtype": "int32, int64", "mode": "count_cumsum"}
    elif isinstance(cell, ParallelCell):
        words |= {
            "thiek": list(cell.thiek),
            "routing": cell.routing.name,
            "processes": cell.processes,
            "on_gpus": cell.on_gpus,
            "split": list(split_of(cell)),
            "chunks": cell.chunks,
            "transport": cell.transport,
            "dtype": cell.dtype,
            "bias": cell.bias,
            "mode": "forward+backward",
        }
    elif isinstance(cell, SpeedCell):
        words |= {"thiek": list(cell.thiek), "routing": cell.routing.name, "dtype": cell.dtype, "mode": cell.mode}
    return words
