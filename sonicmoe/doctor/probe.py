"""``python -m sonicmoe.doctor.probe NAME``: one question in a process of its own, answered as one line of JSON.

NAME is a module to import, or ``kernel``: run one small kernel on the GPU and compare with its expected values.
"""

import importlib
import json
import sys
from typing import Any


def import_module(name: str) -> dict[str, Any]:
    """``{"version": ...}``, with torch also the CUDA version it is built for; ``{"error": ..., "missing": ...}`` where it fails."""
    try:
        module = importlib.import_module(name)
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        return {"error": f"{type(error).__name__}: {error}", "missing": missing}
    answer = {"version": str(getattr(module, "__version__", "imports"))}
    if name == "torch":
        answer["cuda"] = module.version.cuda
    return answer


def run_kernel() -> dict[str, Any]:
    """T = 2 tokens, K = 2, H = 8: each token's two rows weighted and added, in numbers that float32 holds exactly."""
    import torch

    from dispatch.gather_sum_hopper import launch

    if not torch.cuda.is_available():
        return {"error": "torch.cuda.is_available() is false"}
    rows = torch.arange(32, dtype=torch.float32).view(4, 8)
    score = torch.tensor([1.0, 2.0, 0.5, -1.0])
    slot_to_row = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    expected = torch.stack([rows[2] + 2 * rows[0], 0.5 * rows[3] - rows[1]])
    out = torch.full((2, 8), float("nan"), device="cuda")
    launch(rows.cuda(), score.cuda(), slot_to_row.cuda(), None, None, 2, out)
    computed = out.cpu()
    if not torch.equal(computed, expected):
        return {"error": f"wrong values: {computed.tolist()} for {expected.tolist()}"}
    return {"device": torch.cuda.get_device_name()}


def answer(name: str) -> dict[str, Any]:
    if name != "kernel":
        return import_module(name)
    try:
        return run_kernel()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(sys.argv[1])))
