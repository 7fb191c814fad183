"""Are the counts, the dispatch plan and the gather-sum what their definitions say? Judged with NumPy.

T tokens, E experts, R slots; a slot whose expert is outside [0, E) is a sentinel.
"""

from collections.abc import Iterator

import numpy as np
import torch

import dispatch
from dispatch import DispatchPlan
from routing import Routing
from testing.matrix.cells import CountCell
from testing.matrix.results import Check, check

GATHER_WIDTH = 16
"""Columns of the rows that are gathered: the index work is that of the whole layer, the bytes are not."""
GATHER_TOLERANCE = 2e-6
BFLOAT16_ROUNDING = 2.0**-9
"""Largest relative error of one rounding to bfloat16; a sum whose terms are rounded as well shows about 1.2 of it."""
ADDED_SENTINELS = 0.1


def check_plan(plan: DispatchPlan, routing: Routing) -> list[Check]:
    """Every field of the plan against one stable sort by (expert, token, slot)."""
    expert = routing.expert_index.cpu().numpy().astype(np.int64)
    token = routing.token_index.cpu().numpy().astype(np.int64)
    experts, tokens, slots = routing.num_experts, routing.num_tokens, len(expert)
    used = np.flatnonzero((expert >= 0) & (expert < experts))
    order = used[np.lexsort((used, token[used], expert[used]))]
    tail = np.full(slots - len(order), -1)
    slot_to_row = np.full(slots, -1)
    slot_to_row[order] = np.arange(len(order))
    wanted = {
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(expert[used], minlength=experts))]),
        "row_to_slot": np.concatenate([order, tail]),
        "row_to_token": np.concatenate([token[order], tail]),
        "slot_to_row": slot_to_row,
    }
    results = []
    for name, expected in wanted.items():
        got = getattr(plan, name).cpu().numpy()
        same = got.dtype == np.int32 and np.array_equal(got, expected)
        results.append(check(f"plan.{name}", same, _first_difference(name, got, expected)))
    results.append(_check_token_slots(plan, token, used, tokens))
    return results


def _first_difference(name: str, got: np.ndarray, expected: np.ndarray) -> str:
    if got.shape != expected.shape or got.dtype != np.int32:
        return f"{name} is {got.dtype} {got.shape}, expected int32 {expected.shape}"
    at = np.flatnonzero(got != expected)
    return f"{len(at)} of {len(got)} entries differ, first {name}[{at[0]}] = {got[at[0]]}, expected {expected[at[0]]}" if len(at) else ""


def _check_token_slots(plan: DispatchPlan, token: np.ndarray, used: np.ndarray, tokens: int) -> Check:
    """Each token lists its own slots in ascending order, and every used slot is listed exactly once; or it says that they are K each."""
    name, k = "plan.token_slots", plan.slots_per_token
    if k is not None:
        own = np.array_equal(token, np.arange(tokens * k) // k) and plan.token_offsets is None and plan.token_slots is None
        return check(name, own, f"slots_per_token={k} is not what token_index says, or slots are listed beside it")
    offsets, listed = plan.token_offsets.cpu().numpy().astype(np.int64), plan.token_slots.cpu().numpy().astype(np.int64)
    if offsets.shape != (tokens + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] > len(listed):
        return Check(name, False, "token_offsets does not ascend from 0 within token_slots")
    listed = listed[: offsets[-1]]
    if ((listed < 0) | (listed >= len(token))).any() or len(np.unique(listed)) != len(listed):
        return Check(name, False, "token_slots names a slot twice or one that does not exist")
    owner = np.repeat(np.arange(tokens), np.diff(offsets))
    if not np.array_equal(token[listed], owner):
        return Check(name, False, "a token lists a slot of another token")
    if (np.diff(listed)[np.diff(owner) == 0] < 0).any():
        return Check(name, False, "a token's slots are not in ascending order")
    missing = np.setdiff1d(used, listed)
    return check(name, len(missing) == 0, f"{len(missing)} used slots are listed by no token, first {missing[:1]}")


def check_gather_sum(plan: DispatchPlan, routing: Routing, seed: int) -> list[Check]:
    """gather_sum and both gradients at full R and a narrow width; rows that no slot owns hold NaN."""
    device = routing.expert_index.device
    generator = np.random.default_rng(seed)
    slots, tokens = len(routing.expert_index), routing.num_tokens
    slot_to_row = plan.slot_to_row.cpu().numpy().astype(np.int64)
    used = np.flatnonzero(slot_to_row >= 0)
    token, row = routing.token_index.cpu().numpy().astype(np.int64)[used], slot_to_row[used]
    rows = generator.standard_normal((slots, GATHER_WIDTH)).astype(np.float32)
    rows[len(used) :] = np.nan
    score = generator.standard_normal(slots).astype(np.float32)
    weight = generator.standard_normal((tokens, GATHER_WIDTH)).astype(np.float32)
    rows_t = torch.tensor(rows, device=device, requires_grad=True)
    score_t = torch.tensor(score, device=device, requires_grad=True)
    out = dispatch.gather_sum(rows_t, score_t, plan)
    out.backward(torch.tensor(weight, device=device))
    expected = np.zeros((tokens, GATHER_WIDTH))
    np.add.at(expected, token, score[used, None].astype(np.float64) * rows[row])
    d_rows = np.zeros((len(used), GATHER_WIDTH))
    d_rows[row] = score[used, None].astype(np.float64) * weight[token]
    d_score = np.zeros(slots)
    d_score[used] = (rows[row].astype(np.float64) * weight[token]).sum(axis=1)
    narrow = rows_t.detach().bfloat16()
    sums = np.zeros((tokens, GATHER_WIDTH))
    np.add.at(sums, token, score[used, None].astype(np.float64) * narrow.float().cpu().numpy()[row])
    return [
        _close("gather_sum bfloat16", dispatch.gather_sum(narrow, score_t.detach(), plan), sums, BFLOAT16_ROUNDING),
        _close("gather_sum", out.detach(), expected),
        _close("gather_sum d_rows", rows_t.grad[: len(used)], d_rows),
        _check_tail(rows_t.grad[len(used) :]),
        _close("gather_sum d_score", score_t.grad, d_score),
    ]


def _check_tail(gradient: torch.Tensor) -> Check:
    """Rows that no slot owns have a gradient of zero, whatever they hold."""
    wrong = int((gradient != 0).any(1).sum())
    return check("gather_sum d_rows of the tail", wrong == 0, f"{wrong} of the {len(gradient)} rows that no slot owns are not zero")


def _close(name: str, got: torch.Tensor, expected: np.ndarray, rounding: float = 0.0) -> Check:
    values = got.double().cpu().numpy()
    if values.shape != expected.shape:
        return Check(name, False, f"has shape {values.shape}, expected {expected.shape}")
    error = np.linalg.norm(values - expected)
    limit = (GATHER_TOLERANCE + rounding) * np.linalg.norm(expected)
    return check(name, bool(error <= limit), f"is off by {error:.2e} where {limit:.2e} is allowed")


def count_lengths(cell: CountCell, generator: np.random.Generator) -> list[int]:
    """The lengths of a count_cumsum cell, ascending and without repetition."""
    powers = [2**power + extra for power in cell.powers for extra in range(10)]
    drawn = generator.integers(2000, 4001, size=cell.random_lengths).tolist()
    return sorted({*cell.lengths, *powers, *drawn})


def check_counts(cell: CountCell, seed: int, device: str) -> Iterator[Check]:
    """count_cumsum over all lengths, int32 and int64, eager and compiled; yields one check per variant."""
    generator = np.random.default_rng(seed)
    lengths = count_lengths(cell, generator)
    # Compiling for a CPU needs a C++ compiler that a user's machine may lack: tracing is what is tested there.
    backend = "inductor" if device == "cuda" else "aot_eager"
    torch.compiler.reset()
    compiled = torch.compile(dispatch.count_cumsum, backend=backend, fullgraph=True, dynamic=True)
    wrong: dict[str, list[str]] = {}
    ran: dict[str, int] = {}
    for length in lengths:
        ids = _ids_with_sentinels(generator, length, cell.experts)
        used = ids[(ids >= 0) & (ids < cell.experts)]
        count = np.bincount(used, minlength=cell.experts)
        for dtype in (torch.int32, torch.int64):
            tensor = torch.tensor(ids, dtype=dtype, device=device)
            for how, function in (("eager", dispatch.count_cumsum), ("compiled", compiled)):
                variant = f"{str(dtype).removeprefix('torch.')} {how}"
                ran[variant] = ran.get(variant, 0) + 1
                problem = _count_problem(function(tensor, cell.experts), count)
                if problem:
                    wrong.setdefault(variant, []).append(f"length {length}: {problem}")
    counts_only, no_cumsum = dispatch.count_cumsum(tensor, cell.experts, cumsum=False)
    same = no_cumsum is None and np.array_equal(counts_only.cpu().numpy(), count)
    yield check("cumsum=False", same, "differs from the counts with cumsum")
    for variant, times in ran.items():
        found = wrong.get(variant, [])
        yield check(variant, not found, f"{len(found)} of {times} lengths are wrong, first {found[0] if found else ''}")


def _ids_with_sentinels(generator: np.random.Generator, length: int, experts: int) -> np.ndarray:
    ids = generator.integers(0, experts, size=length)
    sentinel = generator.random(length) < ADDED_SENTINELS
    ids[sentinel] = generator.choice([-1, experts, -(2**31), 2**31 - 1], size=int(sentinel.sum()))
    return ids


def _count_problem(got: tuple[torch.Tensor, torch.Tensor | None], count: np.ndarray) -> str:
    if got[1] is None or got[0].dtype != torch.int32 or got[1].dtype != torch.int32:
        return "count and cumsum must be int32 tensors"
    if not np.array_equal(got[0].cpu().numpy(), count):
        return "the counts are wrong"
    if not np.array_equal(got[1].cpu().numpy(), np.cumsum(count)):
        return "the running sum is wrong"
    return ""
