"""One peer's run in a process of its own: ``python -P worker.py FOLDER [PATH ...]``.

FOLDER holds ``request.json`` (which adapter, what the problem is) and ``inputs.pt``; ``result.json`` and, with the test, ``outputs.pt``
are written there. PATHs hold the peer and what it needs, and are searched before everything that is installed. This file, the
adapters and the modules that it shares with the package are loaded by their paths, so that nothing here imports ``sonicmoe``: in
sonic-moe's process that name is the peer's.

T tokens, H hidden size, I intermediate size, E experts, R routed rows, Z = 2I for a gated activation, else I.
"""

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

PACKAGE = Path(__file__).absolute().parents[1]
GATED = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
PLAIN = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu_squared": lambda z: F.relu(z).square()}
MODES = ("inference", "forward", "forward+backward")


@dataclass(frozen=True)
class Problem:
    """What every peer gets. No slot of the routing is a sentinel."""

    x: torch.Tensor
    """(T, H)."""
    w_up: torch.Tensor
    """(E, Z, H), its rows as ``gate_up_layout`` says."""
    w_down: torch.Tensor
    """(E, H, I)."""
    b_up: torch.Tensor | None
    b_down: torch.Tensor | None
    token_index: torch.Tensor
    """(R,) int32."""
    expert_index: torch.Tensor
    """(R,) int32."""
    score: torch.Tensor
    """(R,) float32."""
    dout: torch.Tensor
    """(T, H)."""
    slots_per_token: int | None
    """K where slot ``t * K + j`` is token t's j-th, else None."""
    activation: str
    gate_up_layout: str
    backend: str
    """Ours; no peer's concern."""

    @property
    def num_experts(self) -> int:
        return self.w_down.shape[0]

    @property
    def gated(self) -> bool:
        return self.w_up.shape[1] != self.w_down.shape[2]

    @property
    def act(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The elementwise function of the gate, or of z where there is no gate."""
        functions = GATED if self.gated else PLAIN
        if self.activation not in functions:
            raise ValueError(f"activation={self.activation!r}: must be one of {', '.join(GATED | PLAIN)} for this peer")
        return functions[self.activation]

    def activate(self, z: torch.Tensor) -> torch.Tensor:
        """a (R, I) of z (R, Z) whose gate and up are concatenated."""
        if not self.gated:
            return self.act(z)
        gate, up = z.chunk(2, dim=-1)
        return self.act(gate) * up

    def leaves(self, layout: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> dict[str, torch.Tensor]:
        """x, w_up, w_down, b_up, b_down (where there are biases) and score, ready for gradients; w_up and b_up in another layout."""
        tensors = {"x": self.x, "w_up": layout(self.w_up), "w_down": self.w_down, "score": self.score}
        if self.b_up is not None:
            tensors |= {"b_up": layout(self.b_up), "b_down": self.b_down}
        return {name: tensor.detach().contiguous().requires_grad_() for name, tensor in tensors.items()}

    def split(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up of w_up (E, 2I, H) or b_up (E, 2I) in the problem's layout."""
        return _HALVES[self.gate_up_layout](weight)

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The reverse of `split`."""
        return _JOINED[self.gate_up_layout](gate, up)

    def concatenated(self, weight: torch.Tensor) -> torch.Tensor:
        """w_up or b_up with gate in the first I rows; without a gate as it is."""
        return _JOINED["concatenated"](*self.split(weight)) if self.gated else weight

    def interleaved(self, weight: torch.Tensor) -> torch.Tensor:
        """w_up or b_up with gate in the even rows; without a gate as it is."""
        return _JOINED["interleaved"](*self.split(weight)) if self.gated else weight

    def from_layout(self, layout: str, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of leaves whose w_up and b_up are in the named layout, in the problem's."""
        names = ("w_up", "b_up") if self.gated else ()
        return {name: self.join(*_HALVES[layout](gradient)) if name in names else gradient for name, gradient in gradients.items()}


_HALVES = {"interleaved": lambda weight: (weight[:, 0::2], weight[:, 1::2]), "concatenated": lambda weight: weight.chunk(2, dim=1)}
"""Layout -> gate and up of w_up (E, 2I, H) or b_up (E, 2I)."""
_JOINED = {
    "interleaved": lambda gate, up: torch.stack([gate, up], dim=2).flatten(1, 2),
    "concatenated": lambda gate, up: torch.cat([gate, up], dim=1),
}


def load(path: Path) -> ModuleType:
    """The module of a file, under a name of its own."""
    name = f"peer_worker_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_problem(folder: Path, request: dict[str, Any]) -> Problem:
    tensors = torch.load(folder / "inputs.pt", map_location=request["device"], weights_only=True, mmap=True)
    fields = ("x", "w_up", "w_down", "b_up", "b_down", "token_index", "expert_index", "score", "dout")
    options = {name: request[name] for name in ("slots_per_token", "activation", "gate_up_layout", "backend")}
    return Problem(**{name: tensors.get(name) for name in fields}, **options)


def run(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Run the peer once for its values, then for its memory, then on the clock beside the GEMM bound."""
    timing, memory, thiek = (load(PACKAGE / f"{name}.py") for name in ("timing", "memory", "thiek"))
    device, sizes = torch.device(request["device"]), thiek.Thiek(*request["thiek"])
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    problem = read_problem(folder, request)
    begin = time.perf_counter()
    layer = load(Path(__file__).with_name(f"{request['adapter']}.py")).Layer(problem)
    leaves = list(layer.leaves.values())

    def inference() -> torch.Tensor:
        with torch.no_grad():
            return layer.forward(inference=True)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(layer.forward(inference=False), leaves, problem.dout)

    if request["test"]:
        gradients = dict(zip(layer.leaves, step(), strict=True))
        outputs = {"o inference": inference(), "o": layer.forward(inference=False).detach()}
        outputs |= {f"d{name}": gradient for name, gradient in layer.restore(gradients).items()}
        torch.save({name: tensor.cpu() for name, tensor in outputs.items()}, folder / "outputs.pt")
        del gradients, outputs
    else:
        step()
    first_s = time.perf_counter() - begin
    inputs = [tensor for tensor in vars(problem).values() if isinstance(tensor, torch.Tensor)]
    saved = memory.saved_mib(lambda: layer.forward(inference=False), [*leaves, *inputs])
    peak = memory.peak_mib(step, device)
    if peak is not None:  # without the weights as they came where the peer holds them in another layout
        held = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        given = [problem.w_up, problem.w_down]
        peak -= sum(weight.nbytes for weight in given if weight.untyped_storage().data_ptr() not in held) / 2**20
    bound = timing.gemm_bound_variants(sizes, dtype=problem.x.dtype, device=device, gated=problem.gated)
    own = (inference, lambda: layer.forward(inference=False), step)
    variants = {mode: timing.Variant(lambda _, call=call: call()) for mode, call in zip(MODES, own, strict=True)}
    variants |= {name: bound[name] for name in ("bound forward", "bound forward+backward")}
    times = timing.measure(variants, device=device, **request["effort"])
    return {
        "status": "ran",
        "saved_mib": saved,
        "peak_mib": peak,
        "first_s": round(first_s, 2),
        "torch": torch.__version__,
        "times": {name: time_._asdict() for name, time_ in times.items()},
    }


def main() -> None:
    folder = Path(sys.argv[1])
    sys.path[:0] = sys.argv[2:]
    request = json.loads((folder / "request.json").read_text())
    try:
        result = run(folder, request)
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        result = {"status": "failed", "why": f"{type(error).__name__}: {lines[0]}"}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
