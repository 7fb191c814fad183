"""Is a routing what its rules say? Judged with NumPy in float64, sharing no code with `routing`.

T tokens, E experts, K experts per token. Logits are (T, E).
"""

from typing import NamedTuple

import numpy as np

from routing import Routing
from testing.matrix.cells import RoutingSpec
from testing.matrix.results import Check, check

HIGHEST = float(np.finfo(np.float32).max)
NEAR = 2e-6
"""Keys closer than this, relative to the larger, may be ordered either way by float32 arithmetic."""


class Slots(NamedTuple):
    """A routing on the host."""

    token: np.ndarray
    expert: np.ndarray
    score: np.ndarray
    used: np.ndarray
    """(R,) bool, True where the slot is no sentinel."""


def to_slots(routing: Routing) -> Slots:
    token = routing.token_index.cpu().numpy().astype(np.int64)
    expert = routing.expert_index.cpu().numpy().astype(np.int64)
    used = (expert >= 0) & (expert < routing.num_experts)
    return Slots(token, expert, routing.score.detach().cpu().numpy().astype(np.float64), used)


def finite(logits: np.ndarray) -> np.ndarray:
    """NaN and -inf count as the lowest finite float32, +inf as the highest."""
    return np.nan_to_num(logits.astype(np.float64), nan=-HIGHEST, posinf=HIGHEST, neginf=-HIGHEST)


def affinities(logits: np.ndarray, spec: RoutingSpec) -> np.ndarray:
    """(T, E) float64: softmax over E, sigmoid, or for softmax_topk the logits themselves."""
    logits = finite(logits)
    if spec.scoring == "softmax_topk":
        return logits
    if spec.scoring == "sigmoid":
        with np.errstate(over="ignore"):
            return 1.0 / (1.0 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True)) if len(logits) else logits
    return powers / powers.sum(axis=1, keepdims=True)


def compares_logits(spec: RoutingSpec, bias: np.ndarray | None) -> bool:
    """Whether experts are compared by logits; by scores where a bias is added or groups are judged by a sum of scores."""
    return bias is None and not (spec.num_groups > 1 and spec.group_score == "top2")


def choice_keys(logits: np.ndarray, spec: RoutingSpec, bias: np.ndarray | None) -> np.ndarray:
    """(T, E) float64: what is compared to choose experts."""
    keys = finite(logits) if compares_logits(spec, bias) else affinities(logits, spec)
    return keys if bias is None else keys + bias


def choose(keys: np.ndarray, spec: RoutingSpec, k: int) -> np.ndarray:
    """(T, E) bool: the k largest keys of each token, within its best groups; the lower expert wins a tie."""
    experts = keys.shape[1]
    allowed = np.ones_like(keys, dtype=bool)
    if spec.num_groups > 1:
        allowed = np.repeat(_best(_group_scores(keys, spec), spec.groups_per_token), experts // spec.num_groups, axis=1)
    return _best(np.where(allowed, keys, -np.inf), k)


def _group_scores(keys: np.ndarray, spec: RoutingSpec) -> np.ndarray:
    grouped = keys.reshape(len(keys), spec.num_groups, -1)
    if spec.group_score == "max":
        return grouped.max(axis=2)
    return np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)


def _best(keys: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros_like(keys, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-keys, axis=1, kind="stable")[:, :k], True, axis=1)
    return chosen


def _scores(affinity: np.ndarray, base: np.ndarray, spec: RoutingSpec) -> np.ndarray:
    """(T, E) float64 scores; `base` marks each token's K experts, over which scores are normalised."""
    if spec.scoring == "softmax_topk":
        highest = np.where(base, affinity, -np.inf).max(axis=1, keepdims=True) if len(base) else affinity
        with np.errstate(over="ignore"):
            powers = np.exp(affinity - highest)
        return spec.scale * powers / np.where(base, powers, 0).sum(axis=1, keepdims=True)
    if spec.renormalize:
        with np.errstate(invalid="ignore", divide="ignore"):
            return spec.scale * affinity / np.where(base, affinity, 0).sum(axis=1, keepdims=True)
    return spec.scale * affinity


def check_top_k(routing: Routing, logits: np.ndarray, spec: RoutingSpec, k: int, bias: np.ndarray | None) -> list[Check]:
    """The K best experts of every token, each once, with the scores of the formula.

    Where logits are compared the choice must be the reference's to the last tie; where computed scores are, nearly equal ones
    may be swapped by float32 arithmetic.
    """
    tokens, experts = logits.shape
    slots = to_slots(routing)
    results = [
        check("shapes", len(slots.token) == tokens * k, f"{len(slots.token)} slots where T*K = {tokens * k}"),
        check("slot order", np.array_equal(slots.token, np.repeat(np.arange(tokens), k)), "slot t*K+j is not token t's"),
        check("no sentinels", bool(slots.used.all()), f"{np.count_nonzero(~slots.used)} slots name an expert outside [0, {experts})"),
    ]
    if not all(item.passed for item in results):
        return results
    got = np.zeros((tokens, experts), dtype=bool)
    got[slots.token, slots.expert] = True
    results.append(check("experts differ", int(got.sum()) == tokens * k, "a token names the same expert twice"))
    affinity = affinities(logits, spec)
    keys = choice_keys(logits, spec, bias)
    wanted = choose(keys, spec, k)
    wrong = np.flatnonzero((got != wanted).any(axis=1))
    if not compares_logits(spec, bias) and results[-1].passed:
        wrong = np.array([t for t in wrong if not _near_tie(keys[t], got[t], wanted[t], spec)], dtype=np.int64)
    why = f"{len(wrong)} tokens, the first {wrong[:1]}: other experts than the K best"
    results.append(check("best experts", len(wrong) == 0, why))
    expected = _scores(affinity, got, spec)[slots.token, slots.expert]
    results.append(_check_scores(slots.score, expected, spec))
    return results


def _near_tie(keys: np.ndarray, got: np.ndarray, wanted: np.ndarray, spec: RoutingSpec) -> bool:
    """Whether float32 rounding explains the difference: what was taken is nearly as good as what was left, and not better.

    Better would be an expert of a group that was not to be chosen from.
    """
    left, taken = keys[wanted & ~got], keys[got & ~wanted]
    tolerance = NEAR * np.abs(keys).max()
    if spec.num_groups > 1:
        size = len(keys) // spec.num_groups
        groups = _group_scores(keys[None], spec)[0]
        cut = np.sort(groups)[::-1][spec.groups_per_token - 1 : spec.groups_per_token + 1]
        if cut[0] - cut[-1] <= 4 * tolerance and set(np.flatnonzero(got) // size) != set(np.flatnonzero(wanted) // size):
            return True
    return len(left) == len(taken) and bool(np.all(np.abs(np.sort(left) - np.sort(taken)) <= tolerance))


def _check_scores(got: np.ndarray, expected: np.ndarray, spec: RoutingSpec) -> Check:
    """Tokens whose affinities are all zero have no defined ratio; their scores need only be finite."""
    if not np.isfinite(got).all():
        return Check("scores", False, f"{np.count_nonzero(~np.isfinite(got))} scores are not finite")
    defined = np.isfinite(expected)
    gap = np.abs(got - expected)[defined]
    limit = 4e-6 * np.abs(expected[defined]) + 1e-7 * spec.scale
    return check("scores", bool((gap <= limit).all()), f"differ from the formula by up to {gap.max(initial=0):.2e}")


def rounded_counts(counts: np.ndarray, tokens: int, spec: RoutingSpec) -> tuple[np.ndarray, np.ndarray]:
    """The fewest and the most rows that each expert may have after rounding; they differ for "stochastic" only.

    An expert that would need more than T tokens to round up rounds down and stays out of "balanced"'s running sums.
    """
    tile = spec.tile_m
    down = counts // tile * tile
    excess = np.where(down + tile <= tokens, counts - down, 0)
    up = down + tile * (excess > 0)
    if spec.mode == "stochastic":
        return down, up
    if spec.mode == "balanced":
        running = np.floor(np.concatenate([[0], np.cumsum(excess)]) / tile + 0.5).astype(np.int64)
        exact = down + tile * np.diff(running)
    else:
        exact = {"down": down, "up": up, "nearest": np.where(2 * excess >= tile, up, down)}[spec.mode]
    return exact, exact


def check_rounding(routing: Routing, logits: np.ndarray, spec: RoutingSpec, k: int) -> list[Check]:
    """Token rounding's rules for every expert: counts, who was dropped, who was added, scores, sentinels last."""
    tokens, experts = logits.shape
    slots = to_slots(routing)
    pairs = slots.token[slots.used] * experts + slots.expert[slots.used]
    results = [
        check("sentinels last", bool((np.diff(slots.used.astype(np.int8)) <= 0).all()), "a sentinel stands before a used slot"),
        check("sentinels weigh nothing", not slots.score[~slots.used].any(), "a sentinel's score is not 0"),
        check("pairs differ", len(np.unique(pairs)) == len(pairs), "a token is given to the same expert twice"),
        check("tokens", bool(((slots.token >= 0) & (slots.token <= tokens)).all()), f"a token is outside [0, {tokens}]"),
    ]
    if not all(item.passed for item in results):
        return results
    affinity = affinities(logits, spec)
    base = choose(choice_keys(logits, spec, None), spec, k)
    got = np.zeros_like(base)
    got[slots.token[slots.used], slots.expert[slots.used]] = True
    before, after = base.sum(axis=0), got.sum(axis=0)
    low, high = rounded_counts(before, tokens, spec)
    misaligned, outside = np.flatnonzero(after % spec.tile_m), np.flatnonzero((after < low) | (after > high))
    results.append(check("whole tiles", len(misaligned) == 0, f"experts {misaligned[:8]} have counts {after[misaligned[:8]]}"))
    why = f"experts {outside[:8]} have {after[outside[:8]]} rows from {before[outside[:8]]} with tile {spec.tile_m}"
    results.append(check(f"rounds {spec.mode}", len(outside) == 0, why))
    results.append(_check_total(before, after, tokens, spec))
    if spec.mode == "stochastic":
        results.append(_check_chance(before, after, tokens, spec.tile_m))
    results += _check_who_moved(affinity, base, got)
    expected = _scores(affinity, got, spec)[slots.token[slots.used], slots.expert[slots.used]]
    results.append(_check_scores(slots.score[slots.used], expected, spec))
    return results


def _check_total(before: np.ndarray, after: np.ndarray, tokens: int, spec: RoutingSpec) -> Check:
    """How far the experts that could round either way may move together.

    "balanced" promises half a tile. "stochastic" is right on average: each expert adds less than (tile/2)^2 of variance, so
    six standard deviations are 3 * tile * sqrt(E). The other modes promise nothing about the sum.
    """
    free = before // spec.tile_m * spec.tile_m + spec.tile_m <= tokens
    drift = abs(int((after - before)[free].sum()))
    limits = {"balanced": spec.tile_m / 2, "stochastic": 3 * spec.tile_m * float(np.sqrt(free.sum()))}
    limit = limits.get(spec.mode, float("inf"))
    return check("total kept", drift <= limit, f"the total moved by {drift} rows where {limit:g} are allowed")


def _check_chance(before: np.ndarray, after: np.ndarray, tokens: int, tile: int) -> Check:
    """Does an expert whose excess is the fraction f of a tile round up with probability f?

    Judged by s = sum (2f - 1) (up - f), whose mean is 0 and whose variance is sum (2f - 1)^2 f (1 - f). Rounding to the nearest
    would give s = E / 12 on average where every f is as likely, 10 standard deviations at E = 512.
    """
    free = before // tile * tile + tile <= tokens
    share = (before % tile)[free] / tile
    rounded_up = (after - before // tile * tile)[free] / tile
    got = float(((2 * share - 1) * (rounded_up - share)).sum())
    limit = 6 * float(np.sqrt(((2 * share - 1) ** 2 * share * (1 - share)).sum()))
    return check("rounds up by chance", abs(got) <= limit, f"rounding up follows the excess by {got:.1f} where chance allows {limit:.1f}")


def _check_who_moved(affinity: np.ndarray, base: np.ndarray, got: np.ndarray) -> list[Check]:
    """An expert drops its lowest-scoring rows or adds its highest-scoring unchosen tokens, never both."""
    dropped, added = base & ~got, got & ~base
    both = np.flatnonzero(dropped.any(axis=0) & added.any(axis=0))
    near = NEAR * np.abs(affinity).max(axis=0, initial=0.0)
    kept_low = np.where(base & got, affinity, np.inf).min(axis=0, initial=np.inf)
    dropped_high = np.where(dropped, affinity, -np.inf).max(axis=0, initial=-np.inf)
    added_low = np.where(added, affinity, np.inf).min(axis=0, initial=np.inf)
    left_high = np.where(~base & ~got, affinity, -np.inf).max(axis=0, initial=-np.inf)
    wrong_drop = np.flatnonzero(dropped.any(axis=0) & (dropped_high > kept_low + near))
    wrong_add = np.flatnonzero(added.any(axis=0) & (added_low < left_high - near))
    return [
        check("drops or adds", len(both) == 0, f"experts {both[:8]} both dropped and added rows"),
        check("drops the lowest", len(wrong_drop) == 0, f"experts {wrong_drop[:8]} dropped a row above one they kept"),
        check("adds the highest", len(wrong_add) == 0, f"experts {wrong_add[:8]} added a token below one they left"),
    ]
