"""What a profile runs of each cell, what that costs, and how cells spread over shards.

Nothing here looks at the machine, so that a plan made on one runner holds on all others.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from sonicmoe.names import ACTIVATIONS
from sonicmoe.thiek import Thiek
from testing.matrix.cells import (
    Cell,
    CountCell,
    LayerCell,
    Limits,
    Matrix,
    MatrixError,
    ParallelCell,
    Profile,
    RoutingCell,
    RoutingSpec,
    SpeedCell,
)

UNGATED = tuple(name for name, gated in ACTIVATIONS.items() if not gated)


class Costs(NamedTuple):
    """What cells cost in a worker, in seconds for each unit, and in bytes of the profile's memory."""

    cell: float
    logit: float
    """T*E of the routing, which is checked on the host at full size."""
    row: float
    """T*K of the routing, likewise."""
    expert: float
    """E of the experts' problem, which the oracle walks one by one."""
    flop: float
    """Of one forward and backward pass; the oracle counts as one more."""
    weight: float
    id: float
    compilation: float
    """Of count_cumsum by torch.compile."""
    process: float
    """Each of a cell whose experts are spread over several: its start, and its share of the cores."""
    bytes_per_weight: int


CPU = Costs(
    cell=0.15, logit=1.6e-7, row=6e-6, expert=0.0, flop=5e-11, weight=8e-8, id=2e-8, compilation=2.0, process=4.0, bytes_per_weight=64
)  # fmt: skip
"""One core, fitted to recorded runs of the cpu profile."""
HOPPER = Costs(
    cell=0.6, logit=1.6e-7, row=6e-6, expert=5e-3, flop=2e-14, weight=5e-11, id=2e-8, compilation=10.0, process=10.0, bytes_per_weight=18
)  # fmt: skip
"""An H100 with a core for each worker, estimated: the host's checks as on a CPU, 50 TFLOPS for products (what float64 reaches, in
which the oracle computes), 100 bytes moved for each weight, some 500 launches for each expert. docs/gate.md says what follows."""

_START_S = 12.0
"""Until a worker's first cell runs: imports, a context on the GPU, the matrix file."""
_PROCESS_BYTES = 700 * 2**20
_BYTES_PER_LOGIT = 100
_BYTES_PER_ROW = 800


class ExpertsProblem(NamedTuple):
    """What the experts of a layer cell run at under a profile."""

    thiek: Thiek
    routing: RoutingSpec

    def is_cut(self, cell: LayerCell) -> bool:
        return self.thiek != cell.thiek or self.routing != cell.routing


class Shard(NamedTuple):
    """One shard of a plan: its position, counted from 1, and its cells."""

    index: int
    count: int
    cells: tuple[Cell, ...]
    cost_s: float

    @property
    def label(self) -> str:
        return f"{self.index}/{self.count}"


def weights_per_expert(cell: LayerCell, hidden: int, intermediate: int) -> int:
    """Elements of one expert's up and down projections: 3*H*I with a gate, 2*H*I without."""
    return (2 if cell.activation in UNGATED else 3) * hidden * intermediate


def experts_problem(cell: LayerCell, limits: Limits) -> ExpertsProblem:
    """Cut a layer's experts to the limits: T first, then I, then E. H, K and all misalignments stay.

    T keeps its remainder by 128 and I its remainder by 16 where they are cut, so that a partial tile stays partial.
    A cell with hand-set counts keeps T and E, for they are what it tests.

    Example: (8192, 7168, 2048, 256, 8) under R <= 1536, 6e6 weights, I >= 32 becomes (192, 7168, 32, 32, 8).
    """
    tokens, hidden, intermediate, experts, per_token = cell.thiek
    routing = cell.routing
    if cell.counts is None and limits.routed_rows is not None and tokens * per_token > limits.routed_rows:
        most = max(1, limits.routed_rows // per_token)
        tokens = most - (most - tokens) % 128 if most > 128 else most
    if limits.min_intermediate is not None:
        affordable = limits.weight_elements // (experts * weights_per_expert(cell, hidden, 1))
        wanted = max(limits.min_intermediate, affordable)
        if wanted < intermediate:
            intermediate = min(intermediate, wanted // 16 * 16 + intermediate % 16)
    if cell.counts is None:
        affordable = limits.weight_elements // weights_per_expert(cell, hidden, intermediate)
        experts = min(experts, _choosable_experts(max(affordable, 2 * per_token, 8), routing, per_token))
    if limits.tile_m is not None and routing.tile_m is not None and tokens < cell.thiek.T:
        routing = replace(routing, tile_m=min(routing.tile_m, limits.tile_m))
    return ExpertsProblem(Thiek(tokens, hidden, intermediate, experts, per_token), routing)


def _choosable_experts(experts: int, routing: RoutingSpec, per_token: int) -> int:
    """A number of experts near the given one that the routing's groups divide, with twice K for a token to choose from."""
    group = max(experts // routing.num_groups, -(-2 * per_token // routing.groups_per_token), 2)
    return group * routing.num_groups


def costs_of(profile: Profile) -> Costs:
    return CPU if profile.name == "cpu" else HOPPER


def cost_seconds(cell: Cell, profile: Profile) -> float:
    """Estimated seconds of one cell in one worker."""
    costs = costs_of(profile)
    if isinstance(cell, LayerCell):
        tokens, hidden, intermediate, experts, per_token = experts_problem(cell, profile.limits).thiek
        full = cell.thiek
        flops = 6 * weights_per_expert(cell, hidden, intermediate) * tokens * per_token
        return (
            costs.cell
            + costs.logit * full.T * full.E
            + costs.row * full.T * full.K
            + costs.expert * experts
            + costs.flop * flops * (1 + (cell.repeats or profile.repeats))
            + costs.weight * experts * weights_per_expert(cell, hidden, intermediate)
        )
    if isinstance(cell, RoutingCell):
        return costs.cell + 2 * costs.logit * cell.tokens * cell.experts + costs.row * cell.tokens * cell.per_token
    if isinstance(cell, CountCell):
        ids = sum(cell.lengths) + 10 * sum(2**power for power in cell.powers) + 3000 * cell.random_lengths
        return costs.compilation + 4 * costs.id * ids
    if isinstance(cell, ParallelCell):
        return costs.process * cell.processes
    if isinstance(cell, SpeedCell):
        tokens, hidden, intermediate, _, per_token = cell.thiek
        return 4.4 + 3.3e-14 * 18 * tokens * per_token * hidden * intermediate
    raise TypeError(f"{type(cell).__name__}: no cost is known for this kind of cell")


def memory_bytes(cell: Cell, profile: Profile) -> int:
    """Estimated peak memory of the worker that runs a cell, the process itself included."""
    if isinstance(cell, LayerCell):
        problem = experts_problem(cell, profile.limits).thiek
        weights = problem.E * weights_per_expert(cell, problem.H, problem.I)
        rows = cell.thiek.T * cell.thiek.K + problem.T * problem.K * problem.H // 16
        logits = cell.thiek.T * cell.thiek.E
    elif isinstance(cell, ParallelCell):
        return (1 + cell.processes) * _PROCESS_BYTES
    elif isinstance(cell, RoutingCell):
        weights, rows, logits = 0, cell.tokens * cell.per_token, cell.tokens * cell.experts
    else:
        weights, rows, logits = 0, 2**21, 0
    return int(_PROCESS_BYTES + costs_of(profile).bytes_per_weight * weights + _BYTES_PER_ROW * rows + _BYTES_PER_LOGIT * logits)


def estimated_wall_seconds(cells: Sequence[Cell], profile: Profile, *, workers: int) -> float:
    """How long a run on one GPU should take: cells dearest first, each to the next free worker while memory lasts, then the speed cells.

    The order is that of `pool.run_jobs`, the estimates are those above.
    """
    waiting = sorted((cell for cell in cells if not cell.needs_gpu), key=lambda cell: (-cost_seconds(cell, profile), cell.name))
    memory, now = profile.memory_gib * 2**30, 0.0
    running: list[tuple[float, int]] = []
    while waiting or running:
        free = memory - sum(needed for _, needed in running)
        fits = [cell for cell in waiting if memory_bytes(cell, profile) <= free or not running]
        if fits and len(running) < workers:
            waiting.remove(fits[0])
            running.append((now + cost_seconds(fits[0], profile), memory_bytes(fits[0], profile)))
        else:
            first = min(running)
            running.remove(first)
            now = first[0]
    speed = sum(cost_seconds(cell, profile) for cell in cells if cell.needs_gpu and cell.gpus == 1)
    return _START_S + now + (_START_S + speed if speed else 0.0)


def profile_of(matrix: Matrix, name: str) -> Profile:
    """The profile of that name.

    Raises:
        MatrixError: there is none.
    """
    if name not in matrix.profiles:
        raise MatrixError(f"--profile {name}: is not one of {', '.join(matrix.profiles)}")
    return matrix.profiles[name]


def select(matrix: Matrix, pattern: str | None) -> tuple[Cell, ...]:
    """The cells whose names match a shell pattern such as ``models/*``; all for None.

    Raises:
        MatrixError: no cell matches.
    """
    if pattern is None:
        return matrix.cells
    chosen = tuple(cell for cell in matrix.cells if fnmatch.fnmatchcase(cell.name, pattern))
    if not chosen:
        raise MatrixError(f"--cells {pattern}: matches none of the {len(matrix.cells)} cells of {matrix.path}")
    return chosen


def make_shards(cells: tuple[Cell, ...], profile: Profile, count: int) -> list[Shard]:
    """Spread cells over `count` shards so that the dearest shard is cheap: longest first, each to the lightest shard.

    The same cells always land in the same shards. Cells that need a GPU cost nothing in a profile without one, for
    they are only listed there.

    Raises:
        MatrixError: count is not from 1 to the number of cells.
    """
    if not 1 <= count <= len(cells):
        raise MatrixError(f"--shards {count}: must be from 1 to the {len(cells)} cells")
    costs = {cell.name: 0.0 if cell.needs_gpu and profile.name == "cpu" else cost_seconds(cell, profile) for cell in cells}
    bins: list[list[Cell]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for cell in sorted(cells, key=lambda cell: (-costs[cell.name], cell.name)):
        lightest = min(range(count), key=lambda index: (totals[index], len(bins[index]), index))
        bins[lightest].append(cell)
        totals[lightest] += costs[cell.name]
    order = {cell.name: position for position, cell in enumerate(cells)}
    return [
        Shard(index + 1, count, tuple(sorted(members, key=lambda cell: order[cell.name])), round(totals[index], 2))
        for index, members in enumerate(bins)
    ]


def github_matrix(shards: list[Shard]) -> dict[str, list[dict[str, object]]]:
    """The shards as the value of a GitHub Actions job's ``strategy.matrix``."""
    return {
        "include": [
            {"shard": shard.label, "index": shard.index, "cells": len(shard.cells), "cost_s": round(shard.cost_s, 1)} for shard in shards
        ]
    }
