"""A fresh process's first call of the layer: ``python -m testing.measure.first_call JSON``, one line of JSON on stdout.

The argument has device, backend, thiek, mode ("inference", "forward" of training, or "training step"), and recompile: hide the prebuilt
objects of the up-projection, as a variant that was not built beforehand. The clock starts when torch is imported, and torch's own start
on the GPU is timed apart. See testing/measure/start.py.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN_KERNEL = "sonicmoe.kernels.up_projection"


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
    T, H, I, E, K = asked["thiek"]
    begin = time.perf_counter()
    layer = MoE(H, I, E, K, backend=asked["backend"], device=device, dtype=torch.bfloat16)
    x = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    dout = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    _wait(device)
    found["make_ms"] = _ms_since(begin)
    for name in ("first_ms", "second_ms"):
        begin = time.perf_counter()
        with torch.set_grad_enabled(asked["mode"] != "inference"):
            out = layer(x)
        if asked["mode"] == "training step":
            out.backward(dout)
        _wait(device)
        found[name] = _ms_since(begin)
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


def _hide(kernel: str) -> None:
    """Take the prebuilt objects of one kernel out of sight; the cache on disk stays."""
    import importlib

    module = importlib.import_module("cute_runtime.load")  # `cute_runtime.load` is the function of that name
    folders = module.prebuilt_folders
    hidden = Path(__file__).with_name("no prebuilt objects")
    module.prebuilt_folders = lambda name: [hidden] if name == kernel else folders(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
