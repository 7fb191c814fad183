"""How exact a result is: relative Frobenius errors against the oracle, over the whole tensor and in the worst block.

A relative error cannot be hidden behind an absolute tolerance by tiny values, and the worst block cannot be hidden in an
average. Notation: T tokens, H hidden size, I intermediate size, E experts.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

TOKENS_PER_BLOCK = 128
_PER_TOKEN = ("o", "dx", "dscore")
_PER_EXPERT = ("dw_up", "dw_down", "db_up", "db_down", "drouter")
TENSORS = (*_PER_TOKEN, *_PER_EXPERT)


class Error(NamedTuple):
    """Of one tensor; what is not a finite number is a failure."""

    whole: float
    """||got - oracle|| / ||oracle||."""
    worst_block: float
    """The largest such quotient over the blocks."""
    max_abs: float
    """Largest absolute difference."""


class Threshold(NamedTuple):
    """Largest relative Frobenius errors that pass."""

    whole: float
    worst_block: float


def blocks(name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The blocks that are judged one by one: 128 rows of o, dx and dscore, one expert (first dimension) of everything else."""
    if name not in TENSORS:
        raise ValueError(f"name={name!r}: must be one of {', '.join(TENSORS)}")
    return iter(tensor.split(TOKENS_PER_BLOCK if name in _PER_TOKEN else 1)) if tensor.numel() else iter(())


def measure(name: str, got: torch.Tensor, oracle: torch.Tensor, size: torch.Tensor | None = None) -> Error:
    """The error of one tensor.

    One with a size counts as at least that, as a whole and block by block, and a block as at least 0.3 of the blocks' root mean square:
    a row of the router's gradient may nearly cancel by chance, or be that of an expert that nobody chose, and relative to itself it would
    be all rounding. Dropping one token of a thousand still moves a row by 0.03 of its norm.

    Where the oracle's norm is 0 (an expert without rows), the error is 0 for exact zeros and infinite otherwise. A result
    that is not finite has infinite error. The sums run in float64, a block at a time.

    Args:
        name: one of `TENSORS`; decides what a block is.
        got: any float dtype.
        oracle: same shape, float64 (or float32).
        size: one norm for each row (first dimension), as `sonicmoe.oracle` gives them for dscore and drouter.

    Raises:
        ValueError: shapes differ, or the oracle is not finite.
        TypeError: got is no floating-point tensor, or the oracle is in a narrower dtype than got.
    """
    if got.shape != oracle.shape:
        raise ValueError(f"{name} has shape {tuple(got.shape)}: must be the oracle's {tuple(oracle.shape)}")
    if not got.is_floating_point() or torch.promote_types(got.dtype, oracle.dtype) != oracle.dtype:
        raise TypeError(f"{name} has dtype {got.dtype}: must be floating point and no wider than the oracle's {oracle.dtype}")
    rows = []
    sizes = blocks(name, oracle.new_zeros(len(oracle)) if size is None else size)
    for got_block, oracle_block, size_block in zip(blocks(name, got), blocks(name, oracle), sizes, strict=True):
        wide = oracle_block.double()
        difference = got_block.to(wide.device, torch.float64) - wide
        squares = [tensor.square().sum() for tensor in (difference, wide, size_block.double())]
        rows.append(torch.stack([*squares, difference.abs().max()]))
    if not rows:
        return Error(0.0, 0.0, 0.0)
    differences, norms, least, largest = zip(*torch.stack(rows).tolist(), strict=True)
    if not all(map(math.isfinite, norms + least)):
        raise ValueError(f"{name}: the oracle is not finite")
    total = max(sum(norms), sum(least))
    typical = 0.0 if size is None else 0.3**2 * total / len(norms)
    worst = max(_quotient(difference, max(*own, typical)) for difference, *own in zip(differences, norms, least, strict=True))
    return Error(_quotient(sum(differences), total), worst, max(math.inf if math.isnan(value) else value for value in largest))


def _quotient(difference: float, norm: float) -> float:
    """sqrt(difference / norm) of squared norms; NaN counts as infinite, which is above every threshold."""
    if not math.isfinite(difference):
        return math.inf
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / norm)


def measure_all(got: Mapping[str, torch.Tensor], oracle: Mapping[str, torch.Tensor]) -> dict[str, Error]:
    """`measure` for every tensor of the oracle, with its size where the oracle has one.

    Raises:
        ValueError: got has other tensors than the oracle.
    """
    expected = [name for name in oracle if not name.endswith(" size")]
    if got.keys() != set(expected):
        raise ValueError(f"got {', '.join(sorted(got))}: must be the oracle's tensors {', '.join(sorted(expected))}")
    return {name: measure(name, got[name], oracle[name], oracle.get(f"{name} size")) for name in expected}


def failures(errors: Mapping[str, Error], threshold: Threshold) -> list[str]:
    """One sentence for every error above its threshold; what is not finite never passes."""
    found = []
    for name, error in errors.items():
        for scope in Threshold._fields:
            value, limit = getattr(error, scope), getattr(threshold, scope)
            if not value <= limit:
                found.append(f"{name} {scope} {value:.2e} is above {limit:.1e}")
    return found


THRESHOLDS = {
    torch.bfloat16: Threshold(whole=8.0e-3, worst_block=1.6e-2),
    torch.float16: Threshold(whole=1.0e-3, worst_block=2.0e-3),
    torch.float32: Threshold(whole=5.0e-6, worst_block=1.0e-5),
    torch.float64: Threshold(whole=1.0e-13, worst_block=1.0e-12),
}
"""What `sonicmoe bench` and `sonicmoe report` demand of every tensor, one or two times what rounding z, a, y and the results costs
(bfloat16 at 4096,4096,1024,256,8: o 2.9e-3, dx 5.3e-3, dw_up 3.2e-3, dw_down 3.7e-3, router 3.9e-3).
The matrix has its own thresholds, tensor by tensor."""
