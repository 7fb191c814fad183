"""Runs the project's Hopper kernels on a CPU: their PTX, with the device's barriers, asynchronous copies and matrix products.

    from cute_runtime import emulator

    y = torch.full((R, H), float("nan"), dtype=torch.bfloat16)
    statistics = emulator.launch(variants.down_projection(tile=BROAD, dtype="bfloat16", bias=False), a, w_down, None, offsets, y, 4, 0)

The arguments are CPU tensors and numbers in the order of the kernel's ``trace``; the numbers here are the blocks, and that no launch
before is still under way. The first use of a variant compiles it and keeps PTX and host stub in the cache on disk. ``seed=`` chooses
another order of warps and other moments at which asynchronous work completes: a correct kernel gives the same bits for every seed. A
data race, a missing fence, a deadlock, an address outside the tensors is an :class:`EmulationError` that names the line of PTX.
docs/emulator.md says what is emulated and what is not.
"""

from cute_runtime.emulator.host import emulation, h100_properties
from cute_runtime.emulator.objects import Compiled, compiled
from cute_runtime.emulator.ptx import PTXError
from cute_runtime.emulator.run import EmulationError, Statistics, launch, run_ptx

__all__ = ["Compiled", "EmulationError", "PTXError", "Statistics", "compiled", "emulation", "h100_properties", "launch", "run_ptx"]
