"""Conversion of whole checkpoints, bit by bit and piece by piece: at most one expert's tensors, or one other tensor, are in memory.

Notation: H hidden size, I intermediate size, E experts.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sonicmoe.activations import split_gate_up
from sonicmoe.checkpoints.files import Entry, Reader, write
from sonicmoe.checkpoints.layers import ROUTER_NAMES, STYLES, Layer, Style, find_packed, find_single_experts
from sonicmoe.names import LAYOUTS

PACKED = "sonicmoe"
_LAYOUT_KEY = "sonicmoe.gate_up_layout"


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    layers: int
    tensors: int
    """Written, the ones that were copied included."""
    bytes: int
    gate_up_layout: str
    files: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = PACKED,
    gate_up_layout: str | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write a checkpoint's layers in another form; every other tensor is copied as it is.

    A layer with the prefix P has ``P.experts.<e>.gate_proj.weight`` (I, H), ``up_proj`` (I, H), ``down_proj`` (H, I), or w1, w3,
    w2; in this library's form ``P.w_up`` (E, 2I, H), ``P.w_down`` (E, H, I), with biases ``P.b_up``, ``P.b_down``. Its router is
    renamed: ``P.gate.weight`` is ``P.router.weight``, ``P.gate.e_score_correction_bias`` is ``P.router.selection_bias``.

    Args:
        source: a safetensors file, or a folder of them.
        target: a folder that does not exist yet; it appears when everything is written.
        to: "sonicmoe", or the name of a style in STYLES.
        gate_up_layout: of w_up's rows, see `sonicmoe.routed_experts`. To "sonicmoe", None is "interleaved", and the layout is
            noted in the files; from it, None is the noted one.
        shard_bytes: files are no larger than this if no tensor is.
        progress: called with (bytes written, bytes in all).

    Raises:
        ValueError: an argument that cannot be, or a tensor that does not fit, by name; nothing has been written then.
    """
    source, target = Path(source), Path(target)
    if to not in (PACKED, *STYLES):
        raise ValueError(f"to={to!r}: must be one of {', '.join((PACKED, *STYLES))}")
    if gate_up_layout not in (None, *LAYOUTS):
        raise ValueError(f"gate_up_layout={gate_up_layout!r}: must be one of {', '.join(LAYOUTS)}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes}: must be at least 1")
    if target.exists():
        raise ValueError(f"{target} exists: must be a new folder")
    reader = Reader(source)
    noted = reader.metadata.pop(_LAYOUT_KEY, None)
    metadata = {"format": "pt"} | reader.metadata
    if to == PACKED:
        layers = find_single_experts(reader)
        layout = gate_up_layout or LAYOUTS[0]
        entries = [entry for layer in layers for entry in _packed(reader, layer, layout)]
        metadata[_LAYOUT_KEY] = layout
    else:
        layers = find_packed(reader)
        layout = _noted_layout(noted, gate_up_layout)
        entries = [entry for layer in layers for entry in _single_experts(reader, layer, STYLES[to], layout)]
    entries += _others(reader, layers, to_packed=to == PACKED)
    _refuse_doubles(entries)
    total = sum(entry.size for entry in entries)
    files = _write_all(target, entries, metadata, shard_bytes, total, progress)
    return Converted(len(layers), len(entries), total, layout, files)


def _noted_layout(noted: str | None, asked: str | None) -> str:
    if noted and asked and noted != asked:
        raise ValueError(f"gate_up_layout={asked!r}: must be {noted!r}, as the checkpoint says")
    if not (noted or asked):
        raise ValueError(f"gate_up_layout=None: must be one of {', '.join(LAYOUTS)}, as the checkpoint does not say which it has")
    return noted or asked


def _packed(reader: Reader, layer: Layer, layout: str) -> Iterator[Entry]:
    """w_up, w_down and biases from single experts."""

    def up(kind: str) -> Iterator[torch.Tensor]:
        for expert in range(layer.num_experts):
            gate, up = (reader.whole(layer.expert(expert, part, kind)) for part in ("gate", "up"))
            yield torch.cat([gate, up]) if layout == "concatenated" else torch.stack([gate, up], dim=1)

    def down(kind: str) -> Iterator[torch.Tensor]:
        for expert in range(layer.num_experts):
            yield reader.whole(layer.expert(expert, "down", kind))

    for name, shape in layer.packed.items():
        pieces = up if name.endswith("_up") else down
        kind = "weight" if name.removeprefix(f"{layer.name}.").startswith("w_") else "bias"
        yield Entry(name, layer.dtype, shape, lambda pieces=pieces, kind=kind: pieces(kind))


def _single_experts(reader: Reader, layer: Layer, style: Style, layout: str) -> Iterator[Entry]:
    """Every expert's own tensors from w_up, w_down and biases."""

    def piece(expert: int, part: str, kind: str) -> Iterator[torch.Tensor]:
        name = f"{layer.name}.{kind[0]}_{'down' if part == 'down' else 'up'}"
        tensor = reader.row(name, expert)
        if part != "down":
            halves = split_gate_up(tensor.movedim(0, -1), layout)
            tensor = halves[part == "up"].movedim(-1, 0)
        yield tensor

    for expert in range(layer.num_experts):
        for part in Style._fields:
            for kind in layer.kinds:
                name = layer.expert(expert, part, kind, style)
                arguments = (expert, part, kind)
                yield Entry(name, layer.dtype, layer.shape(part, kind), lambda arguments=arguments: piece(*arguments))


def _others(reader: Reader, layers: list[Layer], *, to_packed: bool) -> Iterator[Entry]:
    """All tensors that are no expert's, the routers of the layers renamed."""
    experts, renamed = set(), {}
    for layer in layers:
        for theirs, ours in ROUTER_NAMES.items():
            old, new = (theirs, ours) if to_packed else (ours, theirs)
            renamed[f"{layer.name}.{old}"] = f"{layer.name}.{new}"
        if to_packed:
            every = ((e, part, kind) for e in range(layer.num_experts) for part in Style._fields for kind in layer.kinds)
            experts |= {layer.expert(*arguments) for arguments in every}
        else:
            experts |= layer.packed.keys()
    for name in reader.shapes:
        if name not in experts:
            yield reader.copy(name, renamed.get(name))


def _refuse_doubles(entries: list[Entry]) -> None:
    seen = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"{entry.name} is in the checkpoint already: must not be, as the conversion writes it")
        seen.add(entry.name)


def _write_all(
    target: Path,
    entries: list[Entry],
    metadata: dict[str, str],
    shard_bytes: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Into a folder beside the target, which takes its name at the end: a target that exists is whole."""
    written = 0

    def wrote(count: int) -> None:
        nonlocal written
        written += count
        if progress:
            progress(written, total)

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        files = write(partial, entries, metadata, shard_bytes=shard_bytes, wrote=wrote)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return files
