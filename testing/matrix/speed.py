"""When a speed cell is too slow: medians of trials against recorded floors, with their spread taken into account.

A trial times the layer, each of its operations and the GEMM bound in turn, on fresh tokens. ratio = bound / layer, trial by
trial, so that what slows both cancels. docs/gate.md states the rule in full; this module needs no torch.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

TRIALS, MOST_TRIALS = 9, 27


class Rule(NamedTuple):
    """What passes."""

    allowed_loss: float
    """Share of a recorded floor that may be lost."""
    most_noise: float
    """Largest uncertainty, relative to the ratio, of a measurement that can be judged."""


class Floor(NamedTuple):
    """What one cell reached in recorded runs."""

    ratio: float
    tflops: float
    kernels: dict[str, float]
    """Operation -> bound / its time."""
    date: str


class Floors(NamedTuple):
    """The floors that come from one kind of device under one power limit."""

    device: str
    power_limit_w: float | None
    cells: dict[str, Floor]


class Machine(NamedTuple):
    """Where a result was measured."""

    device: str | None
    power_limit_w: float | None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Machine":
        return cls(result.get("device"), result.get("power_limit_w"))


class Trial(NamedTuple):
    """Milliseconds of one trial."""

    ms: float
    bound_ms: float
    kernels: dict[str, float]


def summarize(trials: list[Trial]) -> dict[str, Any]:
    """The fields of a speed cell's result that come from its trials: medians, and distances between quartiles."""
    ms, ms_spread = _quartiles([trial.ms for trial in trials])
    bound_ms, bound_spread = _quartiles([trial.bound_ms for trial in trials])
    ratio, ratio_spread = _quartiles([trial.bound_ms / trial.ms for trial in trials])
    kernels = {}
    for name in trials[0].kernels:
        kernel_ratio, kernel_spread = _quartiles([trial.bound_ms / trial.kernels[name] for trial in trials])
        kernels[name] = {
            "ms": statistics.median(trial.kernels[name] for trial in trials),
            "ratio": kernel_ratio,
            "ratio_spread": kernel_spread,
        }
    return {
        "trials": len(trials),
        "ms": ms,
        "ms_spread": ms_spread,
        "bound_ms": bound_ms,
        "bound_ms_spread": bound_spread,
        "ratio": ratio,
        "ratio_spread": ratio_spread,
        "kernels": kernels,
    }


def uncertainty(spread: float, trials: int) -> float:
    """Three standard errors of a median: 3 * 1.2533 sigma / sqrt(n), sigma being the distance between quartiles / 1.349."""
    return 2.79 * spread / math.sqrt(trials)


def needs_more_trials(trials: list[Trial], rule: Rule) -> bool:
    """Whether what was measured so far cannot be judged yet and more trials may help."""
    if len(trials) < TRIALS:
        return True
    summary = summarize(trials)
    noisy = uncertainty(summary["ratio_spread"], len(trials)) > rule.most_noise * summary["ratio"]
    return noisy and len(trials) < MOST_TRIALS


def floor_of(floors: list[Floors], name: str, machine: Machine) -> tuple[Floors, Floor] | None:
    """A cell's floor: of the machine's own device and power limit, else the first that there is, else None."""
    having = [block for block in floors if name in block.cells]
    having.sort(key=lambda block: not is_own(block, machine))
    return (having[0], having[0].cells[name]) if having else None


def is_own(block: Floors, machine: Machine) -> bool:
    """Whether the block's device and power limit are the machine's: TFLOPS and single operations are judged only then."""
    return (block.device, block.power_limit_w) == machine


class Loss(NamedTuple):
    """One way in which a speed cell fails."""

    what: str
    """ratio, tflops, the operation that got slower, or noise."""
    share: float
    """What is lost against the record; of noise, the uncertainty relative to the ratio."""
    why: str


def judge_speed(result: Mapping[str, Any], floors: list[Floors], rule: Rule, machine: Machine) -> list[Loss]:
    """Every reason why a measured speed cell fails; each names what got slower, by how much, against which record.

    What is below its floor by more than is allowed and uncertain fails; of the operations the largest loss comes first.
    """
    trials, ratio = result["trials"], result["ratio"]
    noise = uncertainty(result["ratio_spread"], trials) / ratio
    if noise > rule.most_noise:
        uncertain = f"the ratio {ratio:.3f} is uncertain by {noise:.1%} after {trials} trials"
        return [Loss("noise", noise, f"too noisy to judge: {uncertain}, {rule.most_noise:.1%} is allowed")]
    found = floor_of(floors, result["name"], machine)
    if found is None:
        return []
    block, floor = found
    record = f"of {floor.date} on {block.device}"
    losses = []
    if lost := _lost(ratio, result["ratio_spread"], trials, floor.ratio, rule):
        losses.append(Loss("ratio", lost, f"ratio {ratio:.3f} is {lost:.1%} below the {floor.ratio:.3f} {record}"))
    if not is_own(block, machine):
        return losses
    tflops = result["tflops"]
    if lost := _lost(tflops, tflops * result["ms_spread"] / result["ms"], trials, floor.tflops, rule):
        losses.append(Loss("tflops", lost, f"{tflops:.0f} TFLOPS are {lost:.1%} below the {floor.tflops:.0f} {record}"))
    operations = []
    for name, recorded in floor.kernels.items():
        kernel = (result.get("kernels") or {}).get(name)
        if kernel is None:
            losses.append(Loss(name, 1.0, f"{name} was not measured, and has a floor {record}"))
        elif lost := _lost(kernel["ratio"], kernel["ratio_spread"], trials, recorded, rule):
            longer = recorded / kernel["ratio"] - 1
            operations.append(Loss(name, lost, f"{name} takes {longer:.1%} longer, {kernel['ms']:.3f} ms, than the record {record}"))
    return losses + sorted(operations, key=lambda loss: -loss.share)


def _lost(value: float, spread: float, trials: int, floor: float, rule: Rule) -> float:
    """The share that is lost against the floor, 0 where it is allowed or may be noise."""
    lost = value + uncertainty(spread, trials) < floor * (1 - rule.allowed_loss)
    return 1 - value / floor if lost else 0.0


def _quartiles(values: list[float]) -> tuple[float, float]:
    """(median, distance between the quartiles)."""
    if len(values) == 1:
        return values[0], 0.0
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return median, third - first
