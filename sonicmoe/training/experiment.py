"""Several routings trained side by side: same initial weights, same batches, taking turns step by step."""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from sonicmoe.training import text as texts
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.files import replace_file
from sonicmoe.training.learner import Learner, NonFiniteLossError, period_length
from sonicmoe.training.model import LanguageModel
from sonicmoe.training.recorded import MAX_LOGITS, Recording
from sonicmoe.training.shares import Alone

_EVALUATIONS = 16
_VALIDATION_TOKENS = 8192
_VALIDATION_BATCHES = 2
_CHECKPOINT_FORMAT = 1


class Experiment:
    """The learners of one command. They take turns, so that whatever else the machine does slows all of them alike."""

    def __init__(
        self, config: TrainConfig, text: texts.Text, *, device: torch.device, backend: str = "auto", shares: Alone | None = None
    ) -> None:
        config.validate()
        self.shares = Alone() if shares is None else shares
        self.config = config
        self.text = text
        self.device = device
        self.step = 0
        self.saved: Path | None = None
        """The latest checkpoint of this training, on disk."""
        inputs, targets = texts.validation_windows(
            text.validation, context=config.context, max_windows=max(1, _VALIDATION_TOKENS // config.context)
        )
        self._validation = [
            (i.to(device), t.to(device)) for i, t in zip(inputs.chunk(_VALIDATION_BATCHES), targets.chunk(_VALIDATION_BATCHES), strict=True)
        ]
        self.validation_tokens = targets.numel()
        self.baselines = {
            "unigram": texts.unigram_loss(text.train, targets),
            "bigram": texts.bigram_loss(text.train, inputs, targets),
        }
        self.learners: dict[str, Learner] = {}
        for routing in config.routings:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = LanguageModel(config, routing, backend=backend)
            self.learners[routing] = Learner(model.to(device), config, self.shares)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    @property
    def checkpoint_due(self) -> bool:
        """Every fourth evaluation and at the end: what is saved has just been seen to work."""
        return self.step % (4 * self._evaluation_interval) == 0 or self.finished

    @property
    def _evaluation_interval(self) -> int:
        return max(1, self.config.steps // _EVALUATIONS)

    def advance(self) -> None:
        """One step of every learner, and an evaluation where one is due (the first before any training)."""
        if self.step == 0:
            self._evaluate()
        inputs, targets = texts.training_batch(
            self.text.train, batch_size=self.config.batch_size, context=self.config.context, seed=self.config.seed, step=self.step
        )
        inputs, targets = (self.shares.sequences(part).to(self.device) for part in (inputs, targets))
        for routing, learner in self.learners.items():
            try:
                learner.train_step(self.step, inputs, targets)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"routing {routing}, {error}") from None
        self.step += 1
        if self.step % self._evaluation_interval == 0 or self.finished:
            self._evaluate()

    def _evaluate(self) -> None:
        for routing, learner in self.learners.items():
            loss, _ = learner.evaluate(self._validation)
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"routing {routing}, after step {self.step}: validation loss {loss}")
            learner.history.validation.append([self.step, loss])

    def save(self, path: Path) -> None:
        """Write a checkpoint, in whole or not at all."""
        state = {
            "format": _CHECKPOINT_FORMAT,
            "config": dataclasses.asdict(self.config),
            "text": {"name": self.text.name, "sha256": self.text.sha256},
            "step": self.step,
            "learners": {routing: learner.state_dict() for routing, learner in self.learners.items()},
        }

        def write() -> None:
            with replace_file(path) as file:
                torch.save(state, file)

        self.shares.write(write)
        self.saved = path

    def restore(self, path: Path, checkpoint: dict) -> None:
        """Continue where a checkpoint of the same config and text, read from ``path``, left off."""
        if checkpoint["text"]["sha256"] != self.text.sha256:
            raise ValueError(f"--data {self.text.name}: not the text that the checkpoint was trained on ({checkpoint['text']['name']})")
        self.step = checkpoint["step"]
        for routing, learner in self.learners.items():
            learner.load_state_dict(checkpoint["learners"][routing])
        self.saved = path

    def results(self) -> dict:
        """What metrics.json says about each routing, ready for JSON."""
        return {routing: _results(learner, self.config) for routing, learner in self.learners.items()}

    def recording(self) -> Recording:
        """The first routing's router logits on tokens spread evenly over the validation text, and its experts' load over time."""
        routing, learner = next(iter(self.learners.items()))
        logits = self.shares.gathered(learner.evaluate(self._validation)[1], dim=1)
        rows = min(logits.shape[1], max(1, MAX_LOGITS // (self.config.layers * self.config.num_experts)))
        chosen = torch.linspace(0, logits.shape[1] - 1, rows).round().long()
        ends = self.period_ends()
        metadata = {
            "routing": routing,
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "trained_steps": self.step,
            "tokens_per_step": self.config.tokens_per_step,
            **{
                name: getattr(self.config, name)
                for name in ("hidden_size", "intermediate_size", "num_experts", "experts_per_token", "load_balance", "seed")
            },
        }
        return Recording(logits[:, chosen].numpy(), learner.history.load[: len(ends)].numpy(), np.array(ends), metadata)

    def period_ends(self) -> list[int]:
        """The last step of each period over which the experts' load was summed."""
        length = period_length(self.config)
        return [min(end, self.step) for end in range(length, self.step + length, length)]


def read_checkpoint(path: Path) -> dict:
    """Raises ValueError where there is none or it cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"--resume {path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch.load lets through whatever its parsers raise
        raise ValueError(f"--resume {path}: not a checkpoint of sonicmoe train ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != _CHECKPOINT_FORMAT:
        raise ValueError(f"--resume {path}: not a checkpoint of this version of sonicmoe train (format {_CHECKPOINT_FORMAT})")
    return checkpoint


def _results(learner: Learner, config: TrainConfig) -> dict:
    history = learner.history
    # The first step pays for allocations and kernel loading.
    step_seconds = statistics.median(history.seconds[1:] or history.seconds)
    return {
        "validation_loss_start": history.validation[0][1],
        "validation_loss": history.validation[-1][1],
        "bits_per_byte_start": history.validation[0][1] / math.log(2),
        "bits_per_byte": history.validation[-1][1] / math.log(2),
        "tokens_per_second": config.tokens_per_step / step_seconds,
        "step_ms": 1000 * step_seconds,
        "rows": sum(history.rows),
        "dropped_rows": sum(history.dropped_rows),
        "added_rows": sum(history.added_rows),
        "wasted_row_ratio": statistics.fmean(history.wasted_row_ratio),
        "load_imbalance": statistics.fmean(history.imbalance),
        "parameters": sum(weight.numel() for weight in learner.weights),
        "history": {name: value for name, value in vars(history).items() if name != "load"} | {"load": history.load.tolist()},
    }
