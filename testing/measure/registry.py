"""The suites by name. To add one: a line here and a module testing/measure/<name>.py with ``items(options) -> list[Item]``.

A module is imported when its suite is asked for, so that --help needs no torch.
"""

import importlib
from types import ModuleType

SUITES = {
    "kernels": "each kernel alone beside torch.bmm and its floor",
    "tiles": "the same with every tile, from which the table of tiles follows; needs its kernels built",
    "dispatch": "the router's product and counting beside torch's, the plan, and routing + dispatch as a share of the forward",
    "rounding": "token rounding's wasted rows, and its time per routed row beside top-K's",
    "start": "the first call of a fresh process, with and without a compile, and host time per call",
    "memory": "what is saved for backward, and the peak of a training step",
    "step": "torch.compile, CUDA graphs, waiting for the host, and the same bits twice",
    "sanitizer": "every kernel family under compute-sanitizer's memcheck, racecheck and synccheck",
    "train": "sonicmoe train's loss curve beside the reference backend's and its noise",
}


def load(name: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(f"testing.measure.{name}")
