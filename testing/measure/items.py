"""What a suite is made of: items that run and return cells, and the bounds that cells are judged by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from routing import RouterConfig
from sonicmoe import cases
from sonicmoe.cases import Case
from sonicmoe.moe import MoE
from sonicmoe.thiek import Thiek
from testing.matrix.results import FAILED, NOT_RUN, PASSED

MEASURED = "measured"
"""Of a cell without a bound, or whose bound is for another device or size: a number, no verdict."""

GPU = "an sm_90 GPU"
NEEDS_GPU = f"needs {GPU}"
TINY = Thiek(48, 32, 16, 8, 2)
"""The layer of --quick."""
TINY_TILE = 8
"""Its tile of token rounding."""


@dataclass(frozen=True)
class Options:
    """What all suites are told."""

    device: torch.device
    backend: str
    """"hopper" or "reference"."""
    quick: bool
    """Tiny sizes and few repeats: every path runs, no number means anything."""
    seed: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def judges(self) -> bool:
        """Whether the bounds of speed and memory hold here: they are for the kernels at full size."""
        return self.backend == "hopper" and not self.quick

    def thiek(self, *sizes: int) -> Thiek:
        """T, H, I, E, K, or the tiny sizes."""
        return TINY if self.quick else Thiek(*sizes)

    def rounding(self, k: int, tile_m: int = 128) -> RouterConfig:
        """Token rounding to the nearest tile."""
        return RouterConfig(k=k, method="token_rounding", tile_m=TINY_TILE if self.quick else tile_m)

    def problem(self, thiek: Thiek, router: RouterConfig | None = None) -> tuple[Case, MoE]:
        """Random data in bfloat16 and a layer on it."""
        case = cases.make_case(thiek, seed=self.seed, router=router, device=self.device)
        return case, case.layer(self.backend)


class Item(NamedTuple):
    """One measurement, of one cell or of several that belong together."""

    name: str
    run: Callable[[], list[dict[str, Any]]]
    not_run: str = ""
    """Why it cannot be run here; then its one cell says so."""
    begin: Callable[[], Any] | None = None
    """Begins in the background what ``run`` waits for, once; called for all items of the suite when its first one is at hand."""


class NotRunError(RuntimeError):
    """Raised by an item that finds that it cannot be run here; the message says why."""


class Bound(NamedTuple):
    """What an issue demands of a number."""

    value: float
    unit: str
    limit: float
    rule: str = "under"
    """"under": value < limit; "at most": value <= limit."""
    everywhere: bool = False
    """Whether it holds on any device and at any size."""

    @property
    def holds(self) -> bool:
        return self.value < self.limit if self.rule == "under" else self.value <= self.limit

    @property
    def text(self) -> str:
        return f"{self.value:.4g} {self.unit}: must be {self.rule} {self.limit:.4g}"


def cell(
    options: Options,
    name: str,
    *,
    mode: str,
    bound: Bound | None = None,
    why: str = "",
    thiek: Thiek | None = None,
    routing: str | None = None,
    dtype: str | None = "bf16",
    **numbers: Any,
) -> dict[str, Any]:
    """A cell of recorded results.

    Args:
        mode: what was measured.
        bound: judged where it holds; else the cell is "measured", and says why it has no verdict.
        why: more about a bound that does not hold.
        numbers: what else was measured. Not ``ratio``, which is the speed cells' share of the GEMM bound.
    """
    body = {"name": name, "thiek": thiek and list(thiek), "routing": routing, "dtype": dtype, "mode": mode, **numbers}
    if bound is None:
        return {**body, "status": MEASURED, "passed": None, "why": ""}
    body["bound"] = {"value": bound.value, "unit": bound.unit, "limit": bound.limit, "rule": bound.rule}
    if not (bound.everywhere or options.judges):
        return {**body, "status": MEASURED, "passed": None, "why": f"the bound is for the kernels on {GPU} at full size"}
    passed = bound.holds
    reason = "" if passed else "; ".join(filter(None, (bound.text, why)))
    return {**body, "status": PASSED if passed else FAILED, "passed": passed, "why": reason}


def not_run(name: str, why: str) -> dict[str, Any]:
    """The cell of what was not run."""
    return {"name": name, "mode": name.split("/")[1], "status": NOT_RUN, "passed": None, "why": why}


def broken(name: str, why: str) -> dict[str, Any]:
    """The cell of what raised."""
    return {"name": name, "mode": name.split("/")[1], "status": FAILED, "passed": False, "why": why}


def size_text(thiek: Thiek) -> str:
    """``4096-4096-1024-128-8``, for names."""
    return "-".join(map(str, thiek))


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many elements do not have the same bits; of other shapes or dtypes all."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.numel(), other.numel(), 1)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return int((one.contiguous().view(as_bits) != other.contiguous().view(as_bits)).sum())


def as_json(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have: they become None."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
