"""Suite ``train``: ``sonicmoe train`` follows the reference backend's loss curve within noise, by top-K and by token rounding.

One small language model in bfloat16 is trained from the same weights on the same batches, three times with this backend and three times
with the reference backend; the runs of each have a batch's sequences in another order, and so their sums. How far two runs of one
backend stray from each other, in the mean over the evaluations of the validation loss and over the pairs of both, is the noise of a run;
the means of three runs of either stray by the root of three less. This backend's mean may stray from the reference's by
four times that.

Four: runs that differ by a normal number each stray further once in 35 times (simulated). One run of each, and one more for the noise,
would by the same number once in 7: two numbers say little of a scatter.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from sonicmoe.thiek import Thiek
from sonicmoe.training import text
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.experiment import Experiment
from sonicmoe.training.shares import Alone
from testing.measure.items import Bound, Item, Options, cell

ROUTINGS = {"top_k": "top_k", "nearest": "token_rounding"}
"""Of `sonicmoe train` -> a RouterConfig's method."""
STEPS = 200
RUNS = 3
"""Of each backend."""
MOST_NOISE = 4.0


class Rolled(Alone):
    """All of a batch, beginning with the sequence at a share of it."""

    def __init__(self, share: float) -> None:
        self.share = share

    def sequences(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.roll(-round(self.share * len(batch)), 0)


def items(options: Options) -> list[Item]:
    found = []
    for routing in ROUTINGS:
        name = f"train/{routing}"
        found.append(Item(name, _follows(options, name, routing)))
    return found


def _follows(options: Options, name: str, routing: str) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        small = {"context": 16, "hidden_size": 32, "intermediate_size": 16, "tile_m": 8} if options.quick else {}
        steps = 4 if options.quick else STEPS
        config = TrainConfig(steps=steps, routing=routing, dtype="bfloat16", seed=options.seed % 2**31, **small)
        orders = [Rolled(run / RUNS) for run in range(RUNS)]
        runs = {
            name: [_validation(options, config, backend, order) for order in orders]
            for name, backend in (("backend", options.backend), ("reference", "reference"))
        }
        ours, theirs = ([statistics.fmean(losses) for losses in zip(*curves, strict=True)] for curves in runs.values())
        pairs = [pair for curves in runs.values() for pair in itertools.combinations(curves, 2)]
        strays, noise = _distance(ours, theirs), statistics.fmean(_distance(*pair) for pair in pairs) / RUNS**0.5
        if noise == 0:
            raise RuntimeError("runs in another order have the very same losses: there is no noise to compare with")
        sizes = Thiek(config.tokens_per_step, config.hidden_size, config.intermediate_size, config.num_experts, config.experts_per_token)
        bound = Bound(strays / noise, "of what the means of three runs stray by noise", MOST_NOISE, "at most")
        about = {"thiek": sizes, "routing": ROUTINGS[routing], "steps": steps}
        return [cell(options, name, mode="loss curve", bound=bound, **about, strays=strays, noise=noise, validation_losses=runs)]

    return run


def _validation(options: Options, config: TrainConfig, backend: str, shares: Alone) -> list[float]:
    """The validation loss of each evaluation, the one before any training left out."""
    experiment = Experiment(config, text.load(None, config.context), device=options.device, backend=backend, shares=shares)
    while not experiment.finished:
        experiment.advance()
    (learner,) = experiment.learners.values()
    return [loss for step, loss in learner.history.validation if step]


def _distance(curve: list[float], other: list[float]) -> float:
    return statistics.fmean(abs(one - two) for one, two in zip(curve, other, strict=True))
