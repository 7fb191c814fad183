"""Named ranges around the layer's operations, each with the FLOPs and bytes of its call.

Notation: T tokens, H hidden size, I intermediate size, E experts, R rows, Z = 2I for a gated activation, else I.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import record_function

from sonicmoe import operations
from sonicmoe.activations import is_gated
from sonicmoe.profiling.work import Work, range_name


@contextlib.contextmanager
def annotated(*, on_gpu: bool, rows: int | None = None) -> Iterator[None]:
    """Within the block each call of a layer's operation is a range in the profiler's trace.

    Args:
        on_gpu: whether layers may run on the Hopper backend.
        rows: rows that the routing really fills, where it is known; else all slots count, sentinels too.
    """

    def wrap(name: str, function: Callable) -> Callable:
        signature = inspect.signature(function)

        def call(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            with record_function(range_name(name, call_work(name, bound.arguments, rows))):
                return function(*arguments, **options)

        return call

    with operations.wrapped(wrap, backend_names=("reference", "hopper") if on_gpu else ("reference",)):
        yield


def call_work(name: str, given: dict[str, Any], rows: int | None = None) -> Work | None:
    """The work of one call from its arguments by name; None for an operation that is not known here."""
    rule = _RULES.get(name)
    if rule is None:
        return None
    plan = given["plan"]
    R = plan.slot_to_row.shape[0]
    return rule(given, R if rows is None else min(R, rows), plan)


def _weights(weight: torch.Tensor, R: int) -> int:
    """Elements of the experts' weights that are read or written: of at most one expert a row."""
    experts, *shape = weight.shape
    return min(experts, R) * math.prod(shape)


def _up_projection(given: dict[str, Any], R: int, plan: Any) -> Work:
    x, w_up = given["x"], given["w_up"]
    (T, H), Z = x.shape, w_up.shape[1]
    I = Z // 2 if is_gated(given["activation"]) else Z
    elements = _weights(w_up, R) + min(T, R) * H + R * I + (R * Z if given["store_z"] else 0)
    return Work(2 * R * H * Z, elements * x.element_size())


def _down_projection(given: dict[str, Any], R: int, plan: Any) -> Work:
    w_down = given["w_down"]
    _, H, I = w_down.shape
    return Work(2 * R * H * I, (_weights(w_down, R) + R * (I + H)) * w_down.element_size())


def _activation_backward(given: dict[str, Any], R: int, plan: Any) -> Work:
    """One product, dout by w_down; z is read, dz and scaled_a are written where they are needed."""
    dout, z, w_down = given["dout"], given["z"], given["w_down"]
    (T, H), Z = dout.shape, z.shape[1]
    if w_down is None:
        return Work(0, 2 * R * Z * z.element_size())
    I = w_down.shape[2]
    multiplies = given["need_dz"] or given["need_dscore"]
    elements = R * Z * (2 if given["need_dz"] else 1) + (R * I if given["need_scaled_a"] else 0)
    elements += _weights(w_down, R) + min(T, R) * H if multiplies else 0
    return Work(2 * R * H * I if multiplies else 0, elements * z.element_size())


def _down_weight_grad(given: dict[str, Any], R: int, plan: Any) -> Work:
    dout, scaled_a = given["dout"], given["scaled_a"]
    return _weight_grad(dout, scaled_a, R, plan) if given["need_weight"] else Work(0, min(R, dout.shape[0]) * dout[0].nbytes)


def _up_weight_grad(given: dict[str, Any], R: int, plan: Any) -> Work:
    x, dz = given["x"], given["dz"]
    return _weight_grad(x, dz, R, plan) if given["need_weight"] else Work(0, R * dz.shape[1] * dz.element_size())


def _weight_grad(tokens: torch.Tensor, rows: torch.Tensor, R: int, plan: Any) -> Work:
    """Gathered tokens (T, H) by rows (R, N): (E, H, N), every expert's gradient written."""
    (T, H), N = tokens.shape, rows.shape[1]
    return Work(2 * R * H * N, (min(T, R) * H + R * N + plan.num_experts * H * N) * rows.element_size())


def _dx_rows(given: dict[str, Any], R: int, plan: Any) -> Work:
    dz, w_up = given["dz"], given["w_up"]
    _, Z, H = w_up.shape
    return Work(2 * R * H * Z, (_weights(w_up, R) + R * (Z + H)) * dz.element_size())


def _gather_sum(given: dict[str, Any], R: int, plan: Any) -> Work:
    rows, score = given["rows"], given["score"]
    H = rows.shape[1]
    return Work(0, (R + plan.num_tokens) * H * rows.element_size() + (0 if score is None else R * score.element_size()))


_RULES: dict[str, Callable[[dict[str, Any], int, Any], Work]] = {
    "up_projection": _up_projection,
    "down_projection": _down_projection,
    "activation_backward": _activation_backward,
    "down_weight_grad": _down_weight_grad,
    "up_weight_grad": _up_weight_grad,
    "dx_rows": _dx_rows,
    "gather_sum": _gather_sum,
}
"""As docs/kernels counts them: weights once for every expert with rows, each row and token once."""
