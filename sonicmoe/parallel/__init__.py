"""Expert parallelism on torch.distributed: a layer's experts spread over processes. Names load on first use."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonicmoe.parallel.apply import ExpertParallel, expert_parallel, fully_shard_layer
    from sonicmoe.parallel.failures import PeerError

__all__ = ["ExpertParallel", "PeerError", "expert_parallel", "fully_shard_layer"]

_HOMES = {
    "ExpertParallel": "sonicmoe.parallel.apply",
    "PeerError": "sonicmoe.parallel.failures",
    "expert_parallel": "sonicmoe.parallel.apply",
    "fully_shard_layer": "sonicmoe.parallel.apply",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
