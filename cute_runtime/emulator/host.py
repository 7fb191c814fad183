"""Host halves on CPU tensors: for a while, the CPU is the sm_90 device and kernels are emulated."""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import cute_runtime
from cute_runtime import checks
from cute_runtime.emulator.native import native
from cute_runtime.emulator.run import Statistics, launch
from cute_runtime.variant import Variant

_active: dict[str, Any] | None = None


@contextlib.contextmanager
def emulation(*, seed: int = 0, multiprocessors: int = 4, **options: Any) -> Iterator[list[Statistics]]:
    """Within it the host halves of kernels take CPU tensors: ``dispatch.plan(..., backend="hopper")`` runs as on a GPU, emulated.

    Not for several threads at once; all launches are on one stream. A kernel's function that was loaded outside, or is kept beyond, is
    what it was there.

    Args:
        seed: of every launch, see :func:`cute_runtime.emulator.launch`.
        multiprocessors: what the device is said to have; kernels choose their grids by it.
        **options: ``resident``, ``check_races`` and ``edit`` of every launch.

    Yields:
        a list that grows by the Statistics of each launch.
    """
    global _active
    import torch

    statistics: list[Statistics] = []
    real_device, real_properties = torch.cuda.device, torch.cuda.get_device_properties

    def is_cpu(device: Any) -> bool:
        return isinstance(device, torch.device) and device.type == "cpu"

    def supported(device: Any) -> bool:
        return is_cpu(device)

    def device(device: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if is_cpu(device) else real_device(device)

    def properties(device: Any = None) -> Any:
        return h100_properties(multiprocessors) if is_cpu(device) else real_properties(device)

    previous, _active = _active, {"statistics": statistics, "options": {"seed": seed, "history": [], **options}}
    try:
        with contextlib.ExitStack() as patches:
            for target, name, replacement in (
                (cute_runtime, "load", _loader(cute_runtime.load)),
                (cute_runtime, "is_supported_device", supported),
                (checks, "is_supported_device", supported),
                (torch.cuda, "device", device),
                (torch.cuda, "get_device_properties", properties),
            ):
                patches.enter_context(mock.patch.object(target, name, replacement))
            yield statistics
    finally:
        _active = previous


def h100_properties(multiprocessors: int = 132) -> types.SimpleNamespace:
    """What host halves, and PyTorch's compiler, ask of torch.cuda.get_device_properties, of an H100."""
    return types.SimpleNamespace(
        multi_processor_count=multiprocessors, memory_clock_rate=2_619_000, memory_bus_width=5120, major=9, minor=0
    )


def _loader(real_load: Callable[[Variant], Callable[..., None]]) -> Callable[[Variant], Callable[..., None]]:
    """What stands in for cute_runtime.load. Host halves keep its results, which therefore look each time whether emulation is on."""

    def load(variant: Variant) -> Callable[..., None]:
        def kernel(*arguments: Any) -> None:
            if _active is None:
                real_load(variant)(*arguments)
            else:
                _active["statistics"] += launch(variant, *arguments, **_active["options"])

        kernel.native = native(kernel)
        return kernel

    return load
