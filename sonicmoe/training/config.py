"""What decides the numbers of a training run. Free of torch, so that ``sonicmoe train --help`` is instant."""

import dataclasses
import math
from dataclasses import dataclass

from sonicmoe.names import ROUNDING_MODES

ROUTINGS = ("both", "top_k", *ROUNDING_MODES)
DTYPES = ("float32", "bfloat16")


def _option(default, help_text: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Model, optimizer and routing of one ``sonicmoe train``.

    Two runs with equal configs, the same text and one thread count give the same bits on a CPU. Device and backend are not
    part of it: a checkpoint may move between them. Each field is a command line option of the same name.
    """

    steps: int = _option(300, "optimizer steps")
    batch_size: int = _option(8, "sequences per step")
    context: int = _option(128, "bytes per sequence; T = batch size x context tokens per step")
    hidden_size: int = _option(128, "H, a multiple of 8 and of twice the heads")
    intermediate_size: int = _option(64, "I, the width of one expert, a multiple of 8")
    layers: int = _option(2, "transformer blocks; each one's feed-forward part is a sonicmoe.MoE")
    heads: int = _option(4, "attention heads")
    num_experts: int = _option(16, "E")
    experts_per_token: int = _option(4, "K")
    routing: str = _option("both", "how training routes; both = top_k and nearest, side by side", ROUTINGS)
    tile_m: int = _option(128, "rows of a hardware tile: what token rounding rounds to and wasted rows are counted against")
    lr: float = _option(2e-3, "peak learning rate of AdamW (5%% warm-up, cosine decay to a tenth)")
    load_balance: float = _option(0.01, "coefficient of the load-balance loss")
    z_loss: float = _option(0.001, "coefficient of the router z-loss")
    seed: int = _option(0, "decides initial weights and batches")
    dtype: str = _option("float32", "dtype of the model; bfloat16 keeps float32 master weights in the optimizer", DTYPES)

    @property
    def routings(self) -> tuple[str, ...]:
        """The routings to train, in the order in which they take turns."""
        return ("top_k", "nearest") if self.routing == "both" else (self.routing,)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    def validate(self) -> None:
        """Raise ValueError, in one sentence, for the first option that cannot be."""
        for name in ("steps", "batch_size", "context", "hidden_size", "intermediate_size", "layers", "heads", "num_experts", "tile_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name}={getattr(self, name)}: must be a multiple of 8")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of twice heads={self.heads} (rotary positions turn pairs)"
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token}: must be between 1 and num_experts={self.num_experts}")
        for name, allowed in (("routing", ROUTINGS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr}: must be a finite number above 0")
        for name in ("load_balance", "z_loss"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}={getattr(self, name)}: must be a finite number, 0 or more")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: must be between 0 and {2**31 - 1}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of update ``step`` (from 0): linear warm-up over the first 5% of the steps, then cosine to lr / 10."""
        warm_up = max(1, round(0.05 * self.steps))
        if step < warm_up:
            return self.lr * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, self.steps - warm_up)
        return self.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
