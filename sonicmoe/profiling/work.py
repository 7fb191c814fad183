"""FLOPs and bytes that an operation cannot do without, and the least time that they take.

Two sources: the layer's operations carry theirs in the name of the range that `annotate` puts around them; matrix products and
routing operators are read from the shapes that torch.profiler records with ``record_shapes``.
Notation: T tokens, H hidden size, E experts, K experts per token, R routed slots.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

PREFIX = "sonicmoe::"
_RANGE = re.compile(rf"{PREFIX}(\w+)(?: flops=(\d+) bytes=(\d+))?")
_ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "bool": 1}


class Work(NamedTuple):
    """What must be computed and what must move between memory and multiprocessors at least, each byte once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """What the machine reaches: the rates that floors are taken from.

    Attributes:
        flops_per_s: of a large matrix product.
        bytes_per_s: of a device copy, read + write.
        pinned_bytes_per_s: of a copy from pinned memory to the device.
        source: where the three numbers come from, in words.
    """

    flops_per_s: float
    bytes_per_s: float
    pinned_bytes_per_s: float
    source: str

    def floor_s(self, work: Work) -> float:
        """Seconds: max(FLOPs / matrix rate, bytes / copy rate)."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)


H100 = Peaks(
    700e12,
    3.0e12,
    50e9,
    "assumed for an H100 SXM: 700 TFLOPS in bfloat16, 3.0 TB/s read + write, 50 GB/s from pinned memory (PCIe 5.0 x16)",
)
"""For traces that do not say what their machine reaches."""


def range_name(operation: str, work: Work | None) -> str:
    """The name of the range around one call. Kineto writes names into JSON as they are, so that it has no quotes."""
    return f"{PREFIX}{operation}" + (f" flops={work.flops} bytes={work.bytes}" if work else "")


def read_range(name: str) -> tuple[str, Work | None] | None:
    """(operation, its work or None) of a range's name; None where the name is not one of ours."""
    match = _RANGE.fullmatch(name)
    if match is None:
        return None
    return match[1], None if match[2] is None else Work(int(match[2]), int(match[3]))


def of_operator(name: str, details: dict[str, Any]) -> Work | None:
    """The work of one of PyTorch's or our own operators, None where it or its shapes are not known."""
    shapes, types = details.get("Input Dims"), details.get("Input type")
    rule = _RULES.get(name)
    if rule is None or not shapes or not types:
        return None
    try:
        return rule(_Inputs(shapes, _ITEM_BYTES[types[0]], details.get("Concrete Inputs") or []))
    except (IndexError, KeyError, TypeError, ValueError):
        return None  # an overload with other arguments, or a dtype of another library


class _Inputs(NamedTuple):
    """An operator's inputs: their shapes, the bytes of an element of the first, and the scalars' values as text."""

    shapes: list[Any]
    item_bytes: int
    scalars: list[str]


def _product(given: _Inputs, first: int = 0) -> Work:
    """(.., M, K) @ (.., K, N) from input ``first`` on, read and written once; all in the first input's dtype."""
    left, right = given.shapes[first : first + 2]
    if len(left) < 2 or left[-1] != right[-2]:
        raise ValueError(left)
    batch, (m, k), n = math.prod(left[:-2]), left[-2:], right[-1]
    return Work(2 * batch * m * n * k, batch * (m * k + k * n + m * n) * given.item_bytes)


def _added_product(given: _Inputs) -> Work:
    return _product(given, 1)


def _router_logits(given: _Inputs) -> Work:
    """x and weight in, float32 logits out, where it is a kernel of ours; PyTorch's product is `aten::mm`'s work."""
    (T, H), (E, _) = given.shapes[:2]
    return Work(2 * T * H * E, (T + E) * H * given.item_bytes + T * E * 4)


def _top_k(given: _Inputs) -> Work:
    """T·E logits in, two int32 and a float32 of each slot out."""
    T, E = given.shapes[0]
    return Work(0, T * E * given.item_bytes + 12 * T * int(given.scalars[2]))


def _slot_scores(given: _Inputs) -> Work:
    """T·E logits and the slots' experts in, scores out."""
    return Work(0, math.prod(given.shapes[0]) * given.item_bytes + 8 * given.shapes[1][0])


def _slot_scores_grad(given: _Inputs) -> Work:
    """As `_slot_scores`, and T·E gradients out."""
    return Work(0, 2 * math.prod(given.shapes[0]) * given.item_bytes + 8 * given.shapes[1][0])


def _slot_scores_grad_again(given: _Inputs) -> Work:
    """The same for logits that the operator makes, by PyTorch: their product is `aten::mm`'s work. Two kernels of ours share the call."""
    (T, _), (E, _), (R,) = given.shapes[:3]
    return Work(0, 2 * T * E * 4 + 8 * R)


_RULES = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _added_product,
    "aten::baddbmm": _added_product,
    "sonicmoe::router_logits": _router_logits,
    "sonicmoe_routing::top_k": _top_k,
    "sonicmoe_routing::slot_scores": _slot_scores,
    "sonicmoe_routing::slot_scores_grad": _slot_scores_grad,
    "sonicmoe_routing::slot_scores_grad_again": _slot_scores_grad_again,
}
"""Routing as docs/kernels/router_logits.md and top_k.md count it."""
