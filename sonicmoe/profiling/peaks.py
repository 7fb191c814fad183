"""What this machine reaches, measured in a second: the rates that kernels' floors are taken from."""

from dataclasses import asdict
from typing import Any

import torch

from sonicmoe import timing
from sonicmoe.profiling.work import Peaks

_PRODUCT = 8192
_COPY_BYTES = 2**30
_PINNED_BYTES = 2**28


def measure(device: torch.device) -> dict[str, Any]:
    """The fields of `Peaks` of a GPU: a product of 8192 x 8192 in bfloat16, a device copy of 1 GiB, a pinned copy of 256 MiB; medians."""
    ms = _times(device)
    torch.cuda.empty_cache()
    return asdict(
        Peaks(
            2 * _PRODUCT**3 / (ms["product"] * 1e-3),
            2 * _COPY_BYTES / (ms["copy"] * 1e-3),
            _PINNED_BYTES / (ms["pinned"] * 1e-3),
            "measured in the same run: bfloat16 product of 8192, device copy of 1 GiB, pinned copy of 256 MiB",
        )
    )


def _times(device: torch.device) -> dict[str, float]:
    """Milliseconds of the three."""
    a, b = (torch.randn(_PRODUCT, _PRODUCT, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    variants = {
        "product": timing.Variant(lambda _: torch.mm(a, b)),
        "copy": timing.Variant(lambda _: target.copy_(source)),
        "pinned": timing.Variant(lambda _: target[:_PINNED_BYTES].copy_(pinned, non_blocking=True)),
    }
    return {name: timed.ms for name, timed in timing.measure(variants, device=device, measure_s=0.1).items()}
