"""Router logits for each load of the matrix, the same on every machine for the same seed.

Logits lie on a grid of 1/256, so that two affinities are either equal, and the tie rule decides, or so far apart that
float32 arithmetic cannot swap them: what the routing must choose is known exactly.
"""

from pathlib import Path

import numpy as np

from testing.matrix.cells import RoutingSpec

RECORDING = Path(__file__).resolve().parent.parent / "data" / "recorded_routing.npz"
GRID = 256
SKEW = 1.0
"""Standard deviation of an expert's own offset under the skewed load; the busiest of 128 experts then has about eight times its share."""
SPECIAL_SHARE = 0.01
"""Share of NaN, and as much of each infinity, under the non_finite load."""


def router_logits(load: str, tokens: int, experts: int, seed: int, counts: tuple[int, ...] | None = None) -> np.ndarray:
    """(T, E) float32 logits of a load; with `counts`, logits under which expert e is first choice of counts[e] tokens."""
    generator = np.random.default_rng(seed)
    if counts is not None:
        return _for_counts(counts, generator)
    if load == "recorded":
        from sonicmoe.training.recorded import load_recorded_logits

        return _on_grid(load_recorded_logits(RECORDING, tokens, experts, seed).numpy())
    logits = generator.standard_normal((tokens, experts))
    if load == "skewed":
        logits += SKEW * generator.standard_normal(experts)
    elif load == "ties":
        return np.round(logits).astype(np.float32)
    logits = _on_grid(logits)
    if load == "non_finite" and tokens:
        kind = generator.random((tokens, experts))
        for index, value in enumerate((np.nan, np.inf, -np.inf)):
            logits[(kind >= index * SPECIAL_SHARE) & (kind < (index + 1) * SPECIAL_SHARE)] = value
        logits[0] = np.nan
        logits[-1] = np.inf
    return logits


def selection_bias(spec: RoutingSpec, experts: int, seed: int) -> np.ndarray | None:
    """(E,) float32 per-expert bias for the choice, or None where the routing has none."""
    if not spec.selection_bias:
        return None
    return (spec.selection_bias * np.random.default_rng([seed, 1]).standard_normal(experts)).astype(np.float32)


def _on_grid(logits: np.ndarray) -> np.ndarray:
    return (np.round(logits * GRID) / GRID).astype(np.float32)


def _for_counts(counts: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    first = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    logits = _on_grid(generator.uniform(-1, 0, size=(len(first), len(counts))))
    logits[np.arange(len(first)), first] += 2
    return logits
