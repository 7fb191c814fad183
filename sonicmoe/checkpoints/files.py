"""Safetensors files: reading parts of tensors, and writing a file piece by piece.

The safetensors library writes a file from tensors that are all in memory. A file's header can be written first, though: eight
bytes with its length (little-endian), then JSON with every tensor's dtype, shape and place, then the tensors' bytes
(https://github.com/huggingface/safetensors, "Format"). So what is held at a time is one piece.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""An element's size by the format's names of dtypes."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: its bytes are those of the pieces, one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[torch.Tensor]]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


class Reader:
    """The tensors of a safetensors file, or of all such files of a folder. Nothing is read before it is asked for.

    Raises:
        ValueError: there is no such file, it is not in the format, or a tensor is in two files or in a dtype unknown here.
    """

    def __init__(self, source: Path) -> None:
        from safetensors import SafetensorError, safe_open

        paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        if not paths or not all(path.is_file() for path in paths):
            raise ValueError(f"{source}: must be a .safetensors file or a folder of them")
        self._slices, self.shapes, self.dtypes, self.metadata = {}, {}, {}, {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: must be a safetensors file ({error})") from error
            self.metadata |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                if name in self._slices:
                    raise ValueError(f"{name} is in two files of {source}: must be in one")
                part = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                if self.dtypes[name] not in BYTES:
                    raise ValueError(f"{name} has dtype {self.dtypes[name]}: must be one of {', '.join(BYTES)}")
                self._slices[name] = file, part

    def whole(self, name: str) -> torch.Tensor:
        return self._slices[name][0].get_tensor(name)

    def row(self, name: str, index: int) -> torch.Tensor:
        """``tensor[index]``; only these bytes are read."""
        return self._slices[name][1][index]

    def copy(self, name: str, new_name: str | None = None) -> Entry:
        """The tensor as it is, to be written."""
        return Entry(new_name or name, self.dtypes[name], self.shapes[name], lambda: iter((self.whole(name),)))


def write(folder: Path, entries: Iterable[Entry], metadata: dict[str, str], *, shard_bytes: int, wrote: Callable[[int], None]) -> list[str]:
    """Write one file, or shards of about ``shard_bytes`` and their index, as transformers names them; returns the names of the files.

    ``wrote`` is called with the number of bytes after each piece. A tensor is in one file, however large it is.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, metadata, wrote)
    if count == 1:
        return names
    index = {
        "metadata": {"total_size": sum(entry.size for shard in shards for entry in shard)},
        "weight_map": {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return [*names, _INDEX]


def _write_file(path: Path, entries: list[Entry], metadata: dict[str, str], wrote: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    # Large elements first, so that each tensor begins at a multiple of its element's size.
    entries = sorted(entries, key=lambda entry: -BYTES[entry.dtype])
    end = 0
    for entry in entries:
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (end, end + entry.size)}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            for piece in entry.pieces():
                wrote(file.write(piece.contiguous().flatten().view(torch.uint8).numpy()))
