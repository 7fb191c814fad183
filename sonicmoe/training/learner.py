"""One model, its optimizer and what is remembered of its training."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from routing import expert_counts, top_k, wasted_row_ratio
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.model import LanguageModel, Output
from sonicmoe.training.shares import Alone
from sonicmoe.training.text import batch_seed

_GRADIENT_CLIP = 1.0
_WEIGHT_DECAY = 0.1
_BETAS = (0.9, 0.95)
MAX_PERIODS = 120


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient is NaN or infinite. The weights are those of the step before."""


@dataclass
class History:
    """Measurements of one learner. Lists have one entry per step; losses are means over the tokens, in nats per byte."""

    loss: list[float] = field(default_factory=list)
    load_balance_loss: list[float] = field(default_factory=list)
    z_loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wasted_row_ratio: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    """Rows of the busiest expert over the mean, averaged over the layers."""
    rows: list[int] = field(default_factory=list)
    dropped_rows: list[int] = field(default_factory=list)
    """Rows that plain top-K would have had for the same logits and this routing has not, over all layers."""
    added_rows: list[int] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    """[step, loss] of each evaluation."""
    load: torch.Tensor | None = None
    """(P, L, E) int64: rows of each expert, summed over the steps of each period."""


class Learner:
    """A language model trained with one routing.

    ``weights`` are what the optimizer updates: what this process has of the model's parameters, or float32 copies of it where the
    model computes in a narrower dtype.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, shares: Alone | None = None) -> None:
        self.config = config
        self.model = model
        self.shares = shares = Alone() if shares is None else shares
        shares.spread(model)
        self.partial = [shares.owns_part_of(name) for name, _ in model.named_parameters()]
        """Of each weight: whether other processes have its other experts."""
        parameters = list(model.parameters())
        if config.dtype == "float32":
            self.weights = [shares.local(parameter).detach() if part else parameter for parameter, part in self._with_partial(parameters)]
        else:
            self.weights = [shares.local(parameter).detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data = parameter.data.to(getattr(torch, config.dtype))
        groups = [
            {"params": [weight for weight in self.weights if weight.ndim > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [weight for weight in self.weights if weight.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=_BETAS, fused=True)
        periods = math.ceil(config.steps / period_length(config))
        self.history = History(load=torch.zeros(periods, config.layers, config.num_experts, dtype=torch.int64))

    def train_step(self, step: int, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """One update with the batch of ``step``. Raises NonFiniteLossError before anything is changed."""
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(step)
        output = self._forward(step, inputs)
        loss = cross_entropy(output, targets)
        balance = torch.stack([router.load_balance_loss for router in output.routers]).mean()
        z_loss = torch.stack([router.z_loss for router in output.routers]).mean()
        (loss + self.config.load_balance * balance + self.config.z_loss * z_loss).backward()
        norm = self._collect_gradients()
        # The one host synchronisation of a step: an update with a NaN in it could not be taken back.
        losses = self.shares.mean(torch.stack([loss.detach(), balance.detach(), z_loss.detach()]))
        measured = torch.cat([losses, norm.unsqueeze(0)]).tolist()
        if not all(map(math.isfinite, measured)):
            self.model.zero_grad(set_to_none=True)
            raise NonFiniteLossError(f"step {step + 1}: loss {measured[0]:.4g}, gradient norm {measured[3]:.4g}")
        self._update()
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        self.history.seconds.append(time.perf_counter() - begin)
        self._remember(step, measured, output)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, torch.Tensor]:
        """(nats per byte, router logits (L, T, E) float32 on the CPU of this process's T tokens) with plain top-K routing.

        Token rounding looks at all tokens of a batch to choose a token's experts, later ones included: a method for
        training, not for inference, where a token must not depend on what follows. As in the SonicMoE paper
        (arXiv 2512.14080) models are trained with token rounding and judged with top-K.
        """
        losses, logits = [], []
        with self.model.routed_by_top_k():
            for inputs, targets in batches:
                inputs, targets = self.shares.sequences(inputs), self.shares.sequences(targets)
                output = self.model(inputs)
                losses.append(cross_entropy(output, targets, reduction="sum"))
                logits.append(torch.stack([router.logits.float() for router in output.routers]))
        tokens = sum(targets.numel() for _, targets in batches)
        return self.shares.total(torch.stack(losses).sum()).item() / tokens, torch.cat(logits, dim=1).cpu()

    def state_dict(self) -> dict:
        """Whole tensors, whatever of them is here."""
        weights = [(weight.detach(), part) for weight, part in self._with_partial(self.weights)]
        return {
            "weights": [self.shares.whole(weight) if part else weight for weight, part in weights],
            "optimizer": self._with_moments(self.optimizer.state_dict(), self.shares.whole),
            "history": vars(self.history),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for (weight, part), saved in zip(self._with_partial(self.weights), state["weights"], strict=True):
            weight.copy_(self.shares.part(saved) if part else saved)
        self._publish_weights()
        self.optimizer.load_state_dict(self._with_moments(state["optimizer"], self.shares.part))
        self.history = History(**state["history"])

    def _with_partial(self, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, bool]]:
        return list(zip(tensors, self.partial, strict=True))

    def _with_moments(self, state: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
        """An optimizer's state_dict with the moments of partial weights changed; it numbers weights by its groups."""
        of_weight = {id(weight): part for weight, part in self._with_partial(self.weights)}
        partial = [of_weight[id(weight)] for group in self.optimizer.param_groups for weight in group["params"]]
        moments = {
            index: {name: change(value) if partial[index] and value.ndim else value for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": moments}

    def _forward(self, step: int, inputs: torch.Tensor) -> Output:
        """With random numbers (stochastic rounding draws some) that are a function of seed and step."""
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            torch.manual_seed(batch_seed(self.config.seed, step))
            return self.model(inputs)

    def _collect_gradients(self) -> torch.Tensor:
        """Give ``weights`` the model's gradients, clipped; returns their norm before clipping."""
        for weight, parameter in zip(self.weights, self.model.parameters(), strict=True):
            if weight is not parameter:
                weight.grad = self.shares.local(parameter.grad).float()
                parameter.grad = None
        norm = self.shares.reduce_gradients(self.weights, self.partial)
        torch.nn.utils.clip_grads_with_norm_(self.weights, _GRADIENT_CLIP, norm)
        return norm

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish_weights()

    @torch.no_grad()
    def _publish_weights(self) -> None:
        for weight, parameter in zip(self.weights, self.model.parameters(), strict=True):
            here = self.shares.local(parameter)
            if weight.data_ptr() != here.data_ptr():
                here.copy_(weight)

    @torch.no_grad()
    def _remember(self, step: int, measured: list[float], output: Output) -> None:
        counts = self.shares.total_counts(torch.stack([router.counts for router in output.routers]))
        plain = torch.stack([expert_counts(top_k(router.logits, self.config.experts_per_token)) for router in output.routers])
        plain = self.shares.total(plain)
        change = counts - plain
        imbalance = (counts.amax(dim=1) / counts.float().mean(dim=1)).mean()
        history = self.history
        for series, value in zip((history.loss, history.load_balance_loss, history.z_loss, history.gradient_norm), measured, strict=True):
            series.append(value)
        history.wasted_row_ratio.append(wasted_row_ratio(counts.flatten(), self.config.tile_m).item())
        history.imbalance.append(imbalance.item())
        history.rows.append(counts.sum().item())
        history.dropped_rows.append(-change.clamp(max=0).sum().item())
        history.added_rows.append(change.clamp(min=0).sum().item())
        history.load[step // period_length(self.config)] += counts.cpu()


def cross_entropy(output: Output, targets: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Mean (or sum) over the tokens, float32, nats."""
    return F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def period_length(config: TrainConfig) -> int:
    """Steps over which the experts' load is summed, so that a run of any length has at most 120 periods."""
    return math.ceil(config.steps / MAX_PERIODS)
