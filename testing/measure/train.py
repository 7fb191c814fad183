"""Suite ``train``: ``sonicmoe train`` follows the reference backend's loss curve within noise, by top-K and by token rounding.

One small language model in bfloat16 is trained three times from the same weights on the same batches: with this backend, with the
reference backend, and with the reference backend on batches whose sequences lie the other way round. The last computes the same
sums in another order: how far its validation loss strays from the second's is the noise of a training run. The backend under test
may stray by twice that, in the mean over the evaluations.
"""

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
MOST_NOISE = 2.0


class Reversed(Alone):
    """All of a batch, the last sequence first."""

    def sequences(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.flip(0)


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
        curves = {
            "backend": _validation(options, config, options.backend, Alone()),
            "reference": _validation(options, config, "reference", Alone()),
            "reordered": _validation(options, config, "reference", Reversed()),
        }
        strays, noise = _distance(curves["backend"], curves["reference"]), _distance(curves["reordered"], curves["reference"])
        if noise == 0:
            raise RuntimeError("the reordered run has the reference's very losses: there is no noise to compare with")
        sizes = Thiek(config.tokens_per_step, config.hidden_size, config.intermediate_size, config.num_experts, config.experts_per_token)
        bound = Bound(strays / noise, "of the reference's own noise", MOST_NOISE, "at most")
        about = {"thiek": sizes, "routing": ROUTINGS[routing], "steps": steps}
        return [cell(options, name, mode="loss curve", bound=bound, **about, strays=strays, noise=noise, validation_losses=curves)]

    return run


def _validation(options: Options, config: TrainConfig, backend: str, shares: Alone) -> list[float]:
    """The validation loss of each evaluation, the one before any training left out."""
    experiment = Experiment(config, text.load(None, config.context), device=options.device, backend=backend, shares=shares)
    while not experiment.finished:
        experiment.advance()
    (learner,) = experiment.learners.values()
    return [loss for step, loss in learner.history.validation if step]


def _distance(curve: list[float], reference: list[float]) -> float:
    return statistics.fmean(abs(one - other) for one, other in zip(curve, reference, strict=True))
