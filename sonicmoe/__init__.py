"""Mixture-of-experts layers. Names load on first use, so that ``import sonicmoe`` alone imports nothing heavy, not even torch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonicmoe.experts import routed_experts
    from sonicmoe.moe import MoE, RouterOutput

__all__ = ["MoE", "RouterOutput", "routed_experts"]

_HOMES = {"MoE": "sonicmoe.moe", "RouterOutput": "sonicmoe.moe", "routed_experts": "sonicmoe.experts"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
