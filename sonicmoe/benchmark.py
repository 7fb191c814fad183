"""Judge and time one layer: what `sonicmoe bench` and `sonicmoe report` share.

Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from routing import RouterConfig, wasted_row_ratio
from sonicmoe import accuracy, cases, memory, timing
from sonicmoe.activations import is_gated
from sonicmoe.cases import Case
from sonicmoe.moe import MoE
from sonicmoe.names import MODES
from sonicmoe.thiek import Thiek
from sonicmoe.validation import check_sizes


@dataclass(frozen=True)
class Problem:
    """One layer to measure."""

    thiek: Thiek
    router: RouterConfig
    device: torch.device
    dtype: str = "bf16"
    activation: str = "swiglu"
    bias: bool = False
    gate_up_layout: str = "interleaved"
    backend: str = "auto"
    seed: int = 0
    name: str = "layer"

    def make_case(self) -> Case:
        return cases.make_case(
            self.thiek,
            seed=self.seed,
            router=self.router,
            dtype=cases.DTYPES[self.dtype],
            device=self.device,
            activation=self.activation,
            bias=self.bias,
            gate_up_layout=self.gate_up_layout,
        )

    def describe(self) -> dict[str, Any]:
        """What a recorded cell says of its problem."""
        routing = self.router.method
        if routing == "token_rounding":
            routing = f"{self.router.mode}, tile_m {self.router.tile_m}"
        return {
            "name": self.name,
            "thiek": list(self.thiek),
            "routing": routing,
            "dtype": self.dtype,
            "activation": self.activation,
            "bias": self.bias,
            "gate_up_layout": self.gate_up_layout,
            "backend": self.backend,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Judged:
    """A layer's results next to the oracle's."""

    errors: dict[str, accuracy.Error]
    reference: dict[str, tuple[float, float]]
    """Largest and mean absolute value of the oracle, tensor by tensor."""
    failures: list[str]


@dataclass
class Rows:
    """Rows per trial."""

    tile_m: int
    processed: list[int] = field(default_factory=list)
    hardware: list[int] = field(default_factory=list)
    wasted: list[float] = field(default_factory=list)

    def add(self, counts: torch.Tensor) -> None:
        """Count one routing's rows from its experts' counts (E,)."""
        counts = counts.long()
        self.processed.append(int(counts.sum()))
        self.hardware.append(int(((counts + self.tile_m - 1) // self.tile_m * self.tile_m).sum()))
        self.wasted.append(float(wasted_row_ratio(counts, self.tile_m)))

    def means(self) -> dict[str, float]:
        trials = len(self.processed)
        return {
            "tile_m": self.tile_m,
            "trials": trials,
            "processed_rows": sum(self.processed) / trials,
            "hardware_rows": sum(self.hardware) / trials,
            "wasted_ratio": sum(self.wasted) / trials,
        }


def check(problem: Problem, *, test: bool) -> None:
    """Raise ValueError for a problem that no layer can have, or whose tensors would not fit, before any is allocated."""
    _, H, I, E, K = problem.thiek
    check_sizes(H, I, E, K)
    problem.router.validate(E)
    needed = cases.memory_bytes(problem.thiek, dtype=cases.DTYPES[problem.dtype], activation=problem.activation, test=test)
    available = available_memory(problem.device)
    if needed > available:
        advice = " (without the test it needs less: --skip-test)" if test else ""
        raise ValueError(
            f"thiek={problem.thiek}: needs about {needed / 2**30:.1f} GiB on {problem.device}, "
            f"must be at most the {available / 2**30:.1f} GiB that are free{advice}"
        )


def available_memory(device: torch.device) -> int:
    """Free bytes of the GPU; on a CPU what Linux calls available, within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def judge(problem: Problem, layer: MoE, case: Case) -> Judged:
    """Run forward and backward once and compare every tensor with the oracle."""
    got, routing = cases.run(layer, case)
    return compare(problem, got, case.oracle(routing))


def compare(problem: Problem, got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> Judged:
    """A layer's results next to the oracle's."""
    errors = accuracy.measure_all(got, expected)
    tensors = {name: expected[name] for name in errors}
    reference = {name: (_norm(tensor, math.inf), _norm(tensor, 1) / max(tensor.numel(), 1)) for name, tensor in tensors.items()}
    return Judged(errors, reference, accuracy.failures(errors, accuracy.THRESHOLDS[cases.DTYPES[problem.dtype]]))


def _norm(tensor: torch.Tensor, order: float) -> float:
    """Unlike ``tensor.abs().max()`` it makes no copy, which in float64 would be the largest tensor of all."""
    return torch.linalg.vector_norm(tensor, order).item() if tensor.numel() else 0.0


def layer_variants(layer: MoE, case: Case) -> dict[str, timing.Variant]:
    """The four modes, each with fresh gradients; backward's forward is off the clock."""
    x = case.x.detach().requires_grad_()
    leaves = [x, *layer.parameters()]

    def inference(_: object) -> None:
        with torch.no_grad():
            layer(x)

    def backward(out: torch.Tensor) -> None:
        torch.autograd.grad(out, leaves, case.dout)

    return {
        "inference": timing.Variant(inference),
        "forward": timing.Variant(lambda _: layer(x)),
        "forward+backward": timing.Variant(lambda _: backward(layer(x))),
        "backward": timing.Variant(backward, prepare=lambda: layer(x)),
    }


def time_trials(problem: Problem, trials: Iterable[Case], **measure_options) -> tuple[list[dict[str, Any]], Rows]:
    """Time the four modes next to the GEMM bound, trial after trial.

    Args:
        trials: problems of the same sizes; of several, the medians of their medians count, and the spread is between trials.
        measure_options: of `timing.measure`.

    Returns:
        One cell per mode, with FLOPs of the rows that were processed; and the trials' rows.
    """
    _, H, I, _, _ = problem.thiek
    gated = is_gated(problem.activation)
    bound = timing.gemm_bound_variants(problem.thiek, dtype=cases.DTYPES[problem.dtype], device=problem.device, gated=gated)
    rows = Rows(problem.router.tile_m)
    times: list[dict[str, timing.Timing]] = []
    for case in trials:
        layer = case.layer(problem.backend)
        with torch.no_grad():
            rows.add(layer(case.x, return_router=True)[1].counts)
        times.append(timing.measure(layer_variants(layer, case) | bound, device=problem.device, **measure_options))
    flops = timing.model_flops(rows.means()["processed_rows"], H, I, gated=gated)
    cells = []
    for mode in MODES:
        own = timing.combine([trial[mode] for trial in times])
        bound_ms = timing.combine([trial["bound forward" if mode == "inference" else f"bound {mode}"] for trial in times]).ms
        cell = {"mode": mode, **own._asdict(), "tflops": timing.tflops(flops[mode], own.ms), "bound_ms": bound_ms}
        cells.append({**cell, "ratio": bound_ms / own.ms})
    return cells, rows


def saved_mib(layer: MoE, case: Case) -> float:
    """MiB that a forward pass keeps for backward beyond its input and its parameters."""
    x = case.x.detach().requires_grad_()
    return memory.saved_mib(lambda: layer(x), (x, *layer.parameters(), *layer.buffers()))


def peak_mib(layer: MoE, case: Case) -> float | None:
    """MiB allocated at the peak of forward + backward, weights and gradients included; None where it cannot be measured."""
    return memory.peak_mib(lambda: cases.run(layer, case), case.x.device)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
