"""Routing recorded from a trained model: a file format, and router logits of any size rebuilt from it.

Router logits drawn from a normal distribution load all experts about equally. Those of a trained model do not: some experts
serve several times their share, some hardly anything, and a token's choices hang together. The matrix tests with both.

A recording is an ``.npz`` file, read without pickle:

=================  =========================  ====================================================================
``logits``         (L, N, E) float16          router logits of each layer on N validation tokens, after training
``load``           (P, L, E) int32            training rows of each expert, summed over each of P periods
``load_steps``     (P,) int32                 the last step of each period
``metadata``       () unicode                 JSON: K, routing, steps, text, model sizes
=================  =========================  ====================================================================
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sonicmoe.training.files import replace_file

MAX_LOGITS = 2**17


class Recording(NamedTuple):
    logits: np.ndarray
    load: np.ndarray
    load_steps: np.ndarray
    metadata: dict


def save_recording(path: Path, recording: Recording) -> None:
    """Write a recording, in whole or not at all."""
    with replace_file(path) as file:
        np.savez_compressed(
            file,
            logits=recording.logits.astype(np.float16),
            load=recording.load.astype(np.int32),
            load_steps=recording.load_steps.astype(np.int32),
            metadata=np.array(json.dumps(recording.metadata, sort_keys=True)),
        )


def load_recording(path: str | Path) -> Recording:
    """Read a recording. Raises ValueError where the file is missing or is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            recording = Recording(file["logits"], file["load"], file["load_steps"], json.loads(str(file["metadata"])))
    except FileNotFoundError:
        raise ValueError(f"path={str(path)!r}: no such file") from None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"path={str(path)!r}: not a recorded routing ({error})") from None
    if "experts_per_token" not in recording.metadata:
        raise ValueError(f"path={str(path)!r}: not a recorded routing (its metadata lacks experts_per_token)")
    if recording.logits.ndim != 3 or 0 in recording.logits.shape or not np.isfinite(recording.logits).all():
        raise ValueError(f"path={str(path)!r}: its logits must be a finite, non-empty (layers, tokens, experts) array")
    return recording


def load_recorded_logits(path: str | Path, num_tokens: int, num_experts: int, seed: int, *, layer: int = -1) -> torch.Tensor:
    """Router logits (num_tokens, num_experts) float32 with the skew of a recorded layer, for any T and E.

    Rows are drawn from the recording's N rows with replacement (a bootstrap: counts vary as they would between batches, and
    an expert's share of the rows is the recorded one on average). Experts are taken in blocks of at most as many as were
    recorded, each block with its own draw of rows: within a block a token's logits belong together as recorded, between
    blocks they are independent. A smaller block takes the experts evenly spaced in the order of their recorded top-K load, so
    that it holds the busy and the idle ones in proportion. The experts are then put in random order.
    Where K / E is below the recorded one the busiest experts' share grows: their lead counts for more among the first few choices.

    float16 logits collide where float32 ones would not, so each value is moved uniformly within its float16 step.

    With N = 4 rows and E = 2 recorded experts, 3 tokens and 3 experts become blocks of 2 and 1 experts, for instance
    ``[[a2, b2, a0], [a0, b0, a0], [a2, b2, a3]]`` with a, b the recorded columns and the draws (2, 0, 2) and (0, 0, 3).

    The same arguments give the same values on every machine (they come from NumPy's PCG64 generator).
    Raises ValueError for a size below 0 (experts: below 1), an unreadable file or a layer that is not there.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens}: must be 0 or more")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: must be at least 1")
    recording = load_recording(path)
    layers, rows, recorded_experts = recording.logits.shape
    if not -layers <= layer < layers:
        raise ValueError(f"layer={layer}: the recording has {layers} layers")
    source = recording.logits[layer]
    by_load = np.argsort(_top_k_load(source, recording.metadata["experts_per_token"]), kind="stable")
    random = np.random.default_rng(seed)
    blocks = np.empty((num_tokens, num_experts), np.float32)
    for begin in range(0, num_experts, recorded_experts):
        size = min(recorded_experts, num_experts - begin)
        columns = by_load[((np.arange(size) + 0.5) * recorded_experts / size).astype(np.int64)]
        drawn = source[random.integers(rows, size=num_tokens)][:, columns]
        step = np.spacing(np.abs(drawn)).astype(np.float32)
        blocks[:, begin : begin + size] = drawn.astype(np.float32) + step * (random.random(drawn.shape, np.float32) - 0.5)
    return torch.from_numpy(blocks[:, random.permutation(num_experts)])


def _top_k_load(logits: np.ndarray, k: int) -> np.ndarray:
    """(E,) rows of each expert under top-K of (N, E) logits."""
    chosen = np.argpartition(-logits.astype(np.float32), k - 1, axis=1)[:, :k]
    return np.bincount(chosen.ravel(), minlength=logits.shape[1])
