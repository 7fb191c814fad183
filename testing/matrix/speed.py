"""When a speed cell is too slow: what its trials say against recorded floors, with their spread taken into account.

A trial times the layer, each of its operations and the GEMM bound in turn. ratio = bound / layer, trial by trial, so that what
slows both cancels. A round is one trial of each of the cell's draws of tokens and router, which are the same in every run: how much
work they make is then the same as in the run behind the floor. docs/gate.md states the rule in full; this module needs no torch.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

DRAWS = 5
"""Tokens and routers of a cell, each timed once in a round."""
ROUNDS, MOST_ROUNDS = 2, 6
QUARTILES = 1.349
"""Distance between the quartiles of a normal distribution, in standard deviations."""


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
    """Milliseconds of one trial, of one draw."""

    ms: float
    bound_ms: float
    kernels: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.bound_ms / self.ms


Round = list[Trial]
"""One trial of each draw, in the draws' order."""


def summarize(rounds: list[Round]) -> dict[str, Any]:
    """The fields of a speed cell's result that come from its trials: two rounds or more, all of the same draws."""
    ms, ms_spread = _over_draws(rounds, lambda trial: trial.ms)
    bound_ms, bound_spread = _over_draws(rounds, lambda trial: trial.bound_ms)
    ratio, ratio_spread = _over_draws(rounds, lambda trial: trial.ratio)
    kernels = {}
    for name in rounds[0][0].kernels:
        kernel_ms, _ = _over_draws(rounds, lambda trial, name=name: trial.kernels[name])
        kernel_ratio, kernel_spread = _over_draws(rounds, lambda trial, name=name: trial.bound_ms / trial.kernels[name])
        kernels[name] = {"ms": kernel_ms, "ratio": kernel_ratio, "ratio_spread": kernel_spread}
    return {
        "trials": sum(map(len, rounds)),
        "ms": ms,
        "ms_spread": ms_spread,
        "bound_ms": bound_ms,
        "bound_ms_spread": bound_spread,
        "ratio": ratio,
        "ratio_spread": ratio_spread,
        "draw_ratios": _by_draw(rounds, lambda trial: trial.ratio),
        "kernels": kernels,
    }


def _over_draws(rounds: list[Round], value: Callable[[Trial], float]) -> tuple[float, float]:
    """(mean over draws of each draw's median, distance between the quartiles of one draw's trials).

    The mean, since every trial then counts. Of draws further apart than the measurement scatters a median would be one draw's value,
    sqrt(draws) times as uncertain, and would not see what got slower in the others.

    Two rounds are too few for quartiles, so the distance is that of normal scatter with the pooled standard deviation about each
    draw's own mean, which has trials - draws degrees of freedom.
    """
    variances = [statistics.variance(map(value, trials)) for trials in zip(*rounds, strict=True)]
    return statistics.fmean(_by_draw(rounds, value)), QUARTILES * math.sqrt(statistics.fmean(variances))


def _by_draw(rounds: list[Round], value: Callable[[Trial], float]) -> list[float]:
    """Each draw's median over the rounds."""
    return [statistics.median(map(value, trials)) for trials in zip(*rounds, strict=True)]


def uncertainty(spread: float, trials: int) -> float:
    """Three standard errors of a median: 3 * 1.2533 sigma / sqrt(n), sigma being the distance between quartiles / 1.349.

    Of a mean of medians of few trials each it is up to a quarter too much, which makes up for a sigma from as few as five residuals.
    """
    return 2.79 * spread / math.sqrt(trials)


def needs_more_rounds(rounds: list[Round], rule: Rule) -> bool:
    """Whether what was measured so far cannot be judged yet and another round may help."""
    if len(rounds) < ROUNDS:
        return True
    ratio, spread = _over_draws(rounds, lambda trial: trial.ratio)
    noisy = uncertainty(spread, sum(map(len, rounds))) > rule.most_noise * ratio
    return noisy and len(rounds) < MOST_ROUNDS


def floor_of(floors: list[Floors], name: str, machine: Machine) -> tuple[Floors, Floor] | None:
    """A cell's floor: of the machine's own device and power limit, else of its device under another one, else None.

    Clocks cancel in a ratio, memory does not: an H200 has a third more bandwidth for the same matrix units, and at (4096,4096,1024,256,8)
    a bound that is a quarter shorter than an H100's.
    """
    having = [block for block in floors if name in block.cells and block.device == machine.device]
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
