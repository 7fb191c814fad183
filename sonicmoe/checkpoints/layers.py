"""Names and shapes: where the experts of a layer are in a checkpoint, checked before anything is written.

A layer is a prefix such as ``model.layers.0.mlp``. Expert by expert it holds ``<layer>.experts.<e>.<part>.weight`` (and, with
biases, ``.bias``), the parts being named in one of STYLES; this library holds ``<layer>.w_up``, ``w_down``, ``b_up``, ``b_down``.
Notation: H hidden size, I intermediate size, E experts.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from sonicmoe.checkpoints.files import Reader


class Style(NamedTuple):
    """How a family of checkpoints calls an expert's three projections."""

    gate: str
    up: str
    down: str


STYLES = {"gate_up_down": Style("gate_proj", "up_proj", "down_proj"), "w1w2w3": Style("w1", "w3", "w2")}
"""gate_up_down: Qwen-MoE, OLMoE, DeepSeek, GLM; w1w2w3: Mixtral, in which w1 is the gate, w3 up and w2 down."""

ROUTER_NAMES = {"gate.weight": "router.weight", "gate.e_score_correction_bias": "router.selection_bias"}
"""The names of a layer's router in checkpoints, and in this library."""

_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)")


class Layer(NamedTuple):
    """One layer's experts."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    bias: bool
    dtype: str
    style: Style | None
    """None where the layer is stored as this library has it."""

    def expert(self, expert: int, part: str, kind: str = "weight", style: Style | None = None) -> str:
        """The name of an expert's tensor; ``part`` is gate, up or down."""
        return f"{self.name}.experts.{expert}.{getattr(style or self.style, part)}.{kind}"

    def shape(self, part: str, kind: str = "weight") -> tuple[int, ...]:
        """Of one expert's tensor."""
        rows, columns = (self.hidden_size, self.intermediate_size) if part == "down" else (self.intermediate_size, self.hidden_size)
        return (rows, columns) if kind == "weight" else (rows,)

    @property
    def packed(self) -> dict[str, tuple[int, ...]]:
        """This library's parameters of the layer, with their shapes."""
        E, H, I = self.num_experts, self.hidden_size, self.intermediate_size
        biases = {"b_up": (E, 2 * I), "b_down": (E, H)} if self.bias else {}
        return {f"{self.name}.{name}": shape for name, shape in {"w_up": (E, 2 * I, H), "w_down": (E, H, I), **biases}.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)


def find_single_experts(reader: Reader) -> list[Layer]:
    """All layers that are stored expert by expert.

    Raises:
        ValueError: there is none; an expert or one of its tensors is missing, has another shape or dtype than the layer's first.
    """
    found: dict[str, list[re.Match[str]]] = defaultdict(list)
    for match in filter(None, map(_EXPERT.fullmatch, reader.shapes)):
        found[match["layer"]].append(match)
    if not found:
        raise ValueError("no layer's experts are stored one by one: must have names like <layer>.experts.0.gate_proj.weight or .w1.weight")
    return [_check_single_experts(reader, name, matches) for name, matches in found.items()]


def find_packed(reader: Reader) -> list[Layer]:
    """All layers that are stored as this library has them.

    Raises:
        ValueError: there is none; a tensor of a layer is missing, has another shape than w_down's, or another dtype.
    """
    names = [name.removesuffix(".w_up") for name in reader.shapes if name.endswith(".w_up")]
    if not names:
        raise ValueError("no layer's experts are stored as sonicmoe has them: must have names like <layer>.w_up")
    layers = []
    for name in names:
        down = f"{name}.w_down"
        if len(reader.shapes.get(down, ())) != 3:
            raise ValueError(f"{down} is {_described(reader, down)}: must be there with shape (E, H, I), as {name}.w_up is")
        experts, hidden, intermediate = reader.shapes[down]
        bias = any(f"{name}.{part}" in reader.shapes for part in ("b_up", "b_down"))
        layer = Layer(name, hidden, intermediate, experts, bias, reader.dtypes[down], None)
        for tensor, shape in layer.packed.items():
            _check_tensor(reader, tensor, shape, layer.dtype, down)
        layers.append(layer)
    return layers


def _check_single_experts(reader: Reader, name: str, matches: list[re.Match[str]]) -> Layer:
    parts = {match["part"] for match in matches}
    style = next((style for style in STYLES.values() if parts <= set(style)), None)
    if style is None:
        raise ValueError(f"{name}.experts has tensors called {', '.join(sorted(parts))}: must be those of one of {', '.join(STYLES)}")
    bias = any(match["kind"] == "bias" for match in matches)
    experts = max(int(match["expert"]) for match in matches) + 1
    first = f"{name}.experts.0.{style.gate}.weight"
    if len(reader.shapes.get(first, ())) != 2:
        raise ValueError(f"{first} is {_described(reader, first)}: must be there with shape (I, H)")
    intermediate, hidden = reader.shapes[first]
    layer = Layer(name, hidden, intermediate, experts, bias, reader.dtypes[first], style)
    for expert in range(experts):
        for part in Style._fields:
            for kind in layer.kinds:
                _check_tensor(reader, layer.expert(expert, part, kind), layer.shape(part, kind), layer.dtype, first)
    return layer


def _check_tensor(reader: Reader, name: str, shape: tuple[int, ...], dtype: str, reference: str) -> None:
    if reader.shapes.get(name) != shape:
        wanted = f"must be {reader.dtypes[reference]} {shape}, as {reference} {reader.shapes[reference]} demands"
        raise ValueError(f"{name} is {_described(reader, name)}: {wanted}")
    if reader.dtypes[name] != dtype:
        raise ValueError(f"{name} is {_described(reader, name)}: must be {dtype}, as {reference} is")


def _described(reader: Reader, name: str) -> str:
    return f"{reader.dtypes[name]} {reader.shapes[name]}" if name in reader.shapes else "missing"
