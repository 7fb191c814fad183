"""The text to train on: bytes in, a training and a validation part out. The vocabulary is the 256 byte values.

Losses are nats per byte; divide by ln 2 for bits per byte. Because tokens are bytes, bits per byte can be compared between
models, and with compressors, whatever the text.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

VOCABULARY = 256
BUILT_IN = "pydoc_data.topics"
SEGMENTS = 20
_VALIDATION_SHARE = 10


class Text(NamedTuple):
    """A text, split. Both parts are uint8 tensors on the CPU."""

    name: str
    """Where it came from, as the user named it."""
    sha256: str
    """Of all bytes before the split: a resumed run checks that it reads the same text."""
    train: torch.Tensor
    validation: torch.Tensor


def load(source: str | None, context: int) -> Text:
    """Read a text file, a folder of them, or (None) the Python language documentation that ships with Python.

    Raises ValueError where there is nothing to read or where either part of the split is not longer than ``context`` bytes.
    """
    name, data = (BUILT_IN, _built_in_text()) if source is None else (source, _read(Path(source)))
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    train, validation = split(tokens)
    if validation.numel() <= context:
        raise ValueError(
            f"--data {name}: {len(data)} bytes of text leave {validation.numel()} for validation, and context={context} needs "
            f"at least {context + 1}; give about {_VALIDATION_SHARE * (context + 1) + SEGMENTS * _VALIDATION_SHARE} bytes or more"
        )
    return Text(name, hashlib.sha256(data).hexdigest(), train, validation)


def split(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the text into 20 equal segments; the last tenth of each is validation, the rest is training.

    So both parts see all of the text's subjects, and at most 20 places exist where a sentence begins in one part and ends
    in the other.
    """
    train, validation = [], []
    for segment in torch.tensor_split(tokens, SEGMENTS):
        boundary = segment.numel() - segment.numel() // _VALIDATION_SHARE
        train.append(segment[:boundary])
        validation.append(segment[boundary:])
    return torch.cat(train), torch.cat(validation)


def batch_seed(seed: int, step: int) -> int:
    """What the randomness of a training step is drawn from: a step can be repeated without those before it."""
    return seed * 1_000_003 + step


def training_batch(tokens: torch.Tensor, *, batch_size: int, context: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), both (batch_size, context) int64: random windows, a pure function of ``seed`` and ``step``."""
    generator = torch.Generator().manual_seed(batch_seed(seed, step))
    starts = torch.randint(tokens.numel() - context, (batch_size,), generator=generator)
    windows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def validation_windows(tokens: torch.Tensor, *, context: int, max_windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), both (N, context) int64: up to ``max_windows`` disjoint windows, evenly spread over the text."""
    available = (tokens.numel() - 1) // context
    chosen = torch.linspace(0, available - 1, min(available, max_windows)).round().long()
    windows = tokens[chosen[:, None] * context + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def unigram_loss(train: torch.Tensor, targets: torch.Tensor) -> float:
    """Nats per byte of predicting each byte by its frequency in ``train`` (add-one smoothing)."""
    counts = torch.bincount(train.long(), minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[targets].mean().item()


def bigram_loss(train: torch.Tensor, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Nats per byte of predicting each byte from the one before it, by the pairs' frequency in ``train``.

    A byte never seen after its predecessor falls back on the unigram frequency, which every pair gets with weight 1
    (one pseudo-count spread over the vocabulary).
    """
    unigram = torch.bincount(train.long(), minlength=VOCABULARY).double() + 1
    pairs = torch.bincount(train[:-1].long() * VOCABULARY + train[1:].long(), minlength=VOCABULARY**2).double()
    counts = pairs.view(VOCABULARY, VOCABULARY) + unigram / unigram.sum()
    return -(counts / counts.sum(dim=1, keepdim=True)).log()[inputs, targets].mean().item()


def _built_in_text() -> bytes:
    """The topics of Python's help(), each paragraph once.

    A fifth of the topics' text is there twice or more (the chapter on compound statements, say, repeats those on ``if`` and
    ``for``). Left in, validation text would also be training text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python was installed without pydoc_data.topics, the default text: name a text file with --data") from None

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs)).encode()


def _read(path: Path) -> bytes:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
        data = b"\n\n".join(content for content in map(_read_file, files) if content and b"\0" not in content)
        if not data:
            raise ValueError(f"--data {path}: no text file in that folder")
        return data
    if not path.exists():
        raise ValueError(f"--data {path}: no such file or folder")
    data = _read_file(path)
    if not data:
        raise ValueError(f"--data {path}: the file is empty")
    return data


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from None
