"""What each operation of a layer must compute and move, and how near its measured time comes to the machine's limits.

Notation: T tokens, H hidden size, I intermediate size, E experts, R = T*K rows; gated, two bytes a value. Bytes are counted once: what
caches read again is the kernel's own loss.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

VALUE_BYTES = 2


class Roof(NamedTuple):
    """What a device reaches in practice."""

    tflops: float
    """Of a large bfloat16 product through cuBLAS."""
    tb_per_s: float
    """Of a device copy, read + write."""

    def attainable(self, intensity: float) -> float:
        """TFLOPS at so many FLOPs a byte."""
        return min(self.tflops, self.tb_per_s * intensity)


ROOFS = {"NVIDIA H100 80GB HBM3": Roof(700.0, 3.0)}
"""Measured on an H100 SXM at 700 W: 8192^3 in bfloat16 690 to 723 TFLOPS, device copy 3.0 TB/s."""


class Work(NamedTuple):
    """FLOPs and bytes of one operation in one pass of the layer."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


class Point(NamedTuple):
    """One operation of one measured cell."""

    cell: str
    operation: str
    work: Work
    ms: float

    @property
    def tflops(self) -> float:
        return self.work.flops / (self.ms * 1e9)

    def share(self, roof: Roof) -> float:
        """Of what the device can attain at this intensity."""
        return self.tflops / roof.attainable(self.work.intensity)


def operation_work(thiek: list[int], mode: str) -> dict[str, Work]:
    """Operation -> its work in a layer of these sizes; only experts that can have rows count."""
    T, H, I, E, K = thiek
    R = T * K
    experts = min(E, R)
    x, y, a, z = T * H, R * H, R * I, 2 * R * I
    w_up, w_down = 2 * experts * I * H, experts * I * H
    narrow, wide = 2.0 * R * H * I, 4.0 * R * H * I
    trains = mode != "inference"
    work = {
        "up_projection": Work(wide, x + w_up + a + (z if trains else 0)),
        "down_projection": Work(narrow, a + w_down + y),
        "gather_sum": Work(2.0 * R * H, y + x),
    }
    if mode == "forward+backward":
        work |= {
            "gather_sum": Work(3.0 * R * H, 2 * (y + x)),
            "activation_backward": Work(narrow, x + w_down + 2 * z + a),
            "down_weight_grad": Work(narrow, x + a + w_down),
            "dx_rows": Work(wide, z + w_up + y),
            "up_weight_grad": Work(wide, z + x + w_up),
        }
    return {name: Work(one.flops, one.bytes * VALUE_BYTES) for name, one in work.items()}


def points(result: dict[str, Any]) -> Iterator[Point]:
    """Every operation that the speed cells of a result have timed."""
    for cell in result["cells"]:
        if not cell.get("kernels"):
            continue
        work = operation_work(cell["thiek"], cell["mode"])
        for name, kernel in cell["kernels"].items():
            if name in work and kernel["ms"] > 0:
                yield Point(cell["name"], name, work[name], kernel["ms"])
