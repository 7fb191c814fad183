"""The variants of this package's kernels that are built beforehand."""

from itertools import product

from cute_runtime import Variant
from routing.kernels.logits_tiles import TILES, Tile

HALF = ("bfloat16", "float16")
SCORINGS = ("softmax", "softmax_topk", "sigmoid")
MODES = ("nearest", "up", "down", "stochastic", "balanced")


def top_k(*, dtype: str, scoring: str, by: str) -> Variant:
    """The variant of kernels/top_k.py: the logits' dtype, the scoring, and what is compared: "logit", "score" or "bias"."""
    return Variant("routing.kernels.top_k", {"dtype": dtype, "scoring": scoring, "by": by})


def router_logits(*, dtype: str, tile: Tile) -> Variant:
    """The variant of kernels/router_logits.py: the operands' dtype and the tile."""
    return Variant("routing.kernels.router_logits", {"dtype": dtype, **tile._asdict()})


def slot_scores(*, scoring: str) -> Variant:
    """The variant of kernels/slot_scores.py."""
    return Variant("routing.kernels.slot_scores", {"scoring": scoring})


def slot_scores_grad(*, dtype: str, form: str, scoring: str) -> Variant:
    """The variant of kernels/slot_scores_grad.py: the logits' dtype, the scoring, and form "uniform" (top-K) or "csr" (token rounding)."""
    return Variant("routing.kernels.slot_scores_grad", {"dtype": dtype, "form": form, "scoring": scoring})


def rounding_keys(*, scoring: str) -> Variant:
    """The variant of kernels/rounding_keys.py: scoring "softmax" or "sigmoid"."""
    return Variant("routing.kernels.rounding_keys", {"scoring": scoring})


def rounding_select(*, mode: str) -> Variant:
    """The variant of kernels/rounding_select.py."""
    return Variant("routing.kernels.rounding_select", {"mode": mode})


def rounding_slots(*, step: str) -> Variant:
    """The variant of kernels/rounding_slots.py: step "count" or "write"."""
    return Variant("routing.kernels.rounding_slots", {"step": step})


def prebuilt_variants() -> list[Variant]:
    """All that float32 logits can reach, which are the layer's; for the others the plain forms of top_k. About 40 KB each, the
    router's product 90: it has a kernel for each number of parts.

    Token rounding knows no other logits than float32.
    """
    plain = [*product(SCORINGS, ("logit",)), ("sigmoid", "bias")]
    every = [*plain, ("softmax_topk", "bias"), ("softmax", "score"), ("softmax", "bias"), ("sigmoid", "score")]
    return [
        *(top_k(dtype="float32", scoring=scoring, by=by) for scoring, by in every),
        *(slot_scores_grad(dtype="float32", form=form, scoring=scoring) for form, scoring in product(("uniform", "csr"), SCORINGS)),
        *(top_k(dtype=dtype, scoring=scoring, by=by) for dtype, (scoring, by) in product(HALF, plain)),
        *(slot_scores_grad(dtype=dtype, form="uniform", scoring=scoring) for dtype, scoring in product(HALF, SCORINGS)),
        *(router_logits(dtype=dtype, tile=tile) for dtype, tile in product(HALF, TILES)),
        *(slot_scores(scoring=scoring) for scoring in SCORINGS),
        *(rounding_keys(scoring=scoring) for scoring in ("softmax", "sigmoid")),
        *(rounding_select(mode=mode) for mode in MODES),
        *(rounding_slots(step=step) for step in ("count", "write")),
    ]
