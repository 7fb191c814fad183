"""A fresh process's first call of the layer: ``python -m testing.measure.first_call JSON``, one line of JSON on stdout.

The argument has device, backend, thiek, mode ("inference", "forward" of training, or "training step"), and recompile: hide the prebuilt
objects of the up-projection, as a variant that was not built beforehand. The clock starts when torch is imported, and torch's own start
on the GPU is timed apart. See testing/measure/start.py.

Where the first call's time goes, on the thread that calls: PARTS, each without those that it calls, and rest_ms. The layer begins to import
tvm_ffi in a thread of its own when it is made: libraries_ms is what is left to wait for.
"""

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN_KERNEL = "sonicmoe.kernels.up_projection"
PACKAGES = ("cute_runtime", "dispatch", "routing", "sonicmoe")
"""The library."""
PARTS = {
    "product_ms": "PyTorch's products, the first with its start of cuBLAS: on the kernels none but of a backward, the router's gradients",
    "libraries_ms": "tvm_ffi and the CUDA runtime, until kernels can use them",
    "find_ms": "finding the kernels' objects, which are checked",
    "open_ms": "loading them",
    "launch_ms": "their first launches, in one call",
    "wait_ms": "until the GPU is done",
}


class Clock:
    """Milliseconds by part, each without the parts that it calls, on the thread that makes the clock: others call the same functions."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.ms = dict.fromkeys(PARTS, 0.0)
        self._within = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **options)
            self._within.append(0.0)
            begin = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent = _ms_since(begin)
                self.ms[part] += spent - self._within.pop()
                self._within[-1] += spent

        return run

    def watch(self) -> Callable[[], None]:
        """Time the functions that the parts are spent in; returns what puts the right ones back."""
        loader = importlib.import_module("cute_runtime.load")  # `cute_runtime.load` is the function of that name
        torch, launches = (importlib.import_module(name) for name in ("torch", "cute_runtime.launches"))
        watched = [
            ("product_ms", torch, "mm"),
            ("libraries_ms", loader, "_share_tvm_ffi"),
            ("libraries_ms", loader, "_share_cuda_runtime"),
            ("find_ms", loader, "find"),
            ("open_ms", loader, "_open"),
        ]
        right = [(module, name, getattr(module, name)) for _, module, name in watched]
        for (part, *_), (module, name, function) in zip(watched, right, strict=True):
            setattr(module, name, self.timed(part, function))
        one_call = launches.one_call
        right.append((launches, "one_call", one_call))
        launches.one_call = lambda *args: self.timed("launch_ms", one_call(*args))

        def restore() -> None:
            for module, name, function in right:
                setattr(module, name, function)

        return restore


def main(argument: str) -> int:
    asked = json.loads(argument)
    import torch

    begin = time.perf_counter()
    device = torch.device(asked["device"])
    ready = torch.zeros(1, device=device)  # creates the CUDA context
    _wait(device)
    found = {"context_ms": _ms_since(begin)}
    if asked["recompile"]:
        _hide(HIDDEN_KERNEL)

    begin = time.perf_counter()
    from sonicmoe import MoE

    found["import_ms"] = _ms_since(begin)
    found["modules_without_bytecode"] = sum(_lacks_bytecode(module) for module in sys.modules.values())
    T, H, I, E, K = asked["thiek"]
    begin = time.perf_counter()
    layer = MoE(H, I, E, K, backend=asked["backend"], device=device, dtype=torch.bfloat16)
    x = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    dout = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    _wait(device)
    found["make_ms"] = _ms_since(begin)
    clock = Clock()
    restore, wait = clock.watch(), clock.timed("wait_ms", _wait)
    for name in ("first_ms", "second_ms"):
        begin = time.perf_counter()
        with torch.set_grad_enabled(asked["mode"] != "inference"):
            out = layer(x)
        if asked["mode"] == "training step":
            out.backward(dout)
        wait(device)
        found[name] = _ms_since(begin)
        if name == "first_ms":
            restore()
            wait = _wait
            found |= clock.ms | {"rest_ms": found[name] - sum(clock.ms.values())}
    found["finite"] = bool(out.isfinite().all() and ready.isfinite().all())
    found["compiler_imported"] = "cutlass" in sys.modules
    print(json.dumps(found))
    return 0


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1e3


def _lacks_bytecode(module: Any) -> bool:
    """Whether a module of this library was compiled anew."""
    own = (module.__name__ or "").partition(".")[0] in PACKAGES
    cached = getattr(module, "__cached__", None)
    return own and cached is not None and not os.path.exists(cached)


def _hide(kernel: str) -> None:
    """Take the prebuilt objects of one kernel out of sight; the cache on disk stays."""
    module = importlib.import_module("cute_runtime.load")
    folders = module.prebuilt_folders
    hidden = Path(__file__).with_name("no prebuilt objects")
    module.prebuilt_folders = lambda name: [hidden] if name == kernel else folders(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
