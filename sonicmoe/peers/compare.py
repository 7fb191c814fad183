"""The host half of ``sonicmoe bench --peers``: hands every peer the same problem, in a process of its own, and judges what comes back.

Inputs go through a file, results come back as JSON and as a file of tensors, one peer after the other on the same device. Each times
the GEMM bound in its own process, in turn with its own layer, so that ratios can be compared; the router is not part of what is timed.
T tokens, H hidden size, E experts, K experts per token, R routed rows.
"""

import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from routing import Routing
from routing.linalg import linear
from sonicmoe import accuracy, benchmark, cases, oracle, timing
from sonicmoe.activations import is_gated
from sonicmoe.peers import OURS, PEERS, Peer

MODES = ("inference", "forward", "forward+backward")
TIMEOUT_S = 1200.0
"""For one process: some peers compile their kernels on first use."""
EFFORT: dict[str, float] = {}
"""Options of `timing.measure` in every process."""
WORKER = Path(__file__).with_name("worker.py")


def check_names(names: Sequence[str], paths: Mapping[str, str]) -> None:
    """Raise ValueError for a peer that does not exist or a folder that does not hold it."""
    for name in (*names, *paths):
        if name not in PEERS:
            raise ValueError(f"peers={name!r}: must be one of {', '.join(PEERS)}")
    for name, path in paths.items():
        missing = [folder for folder in path.split(os.pathsep) if not Path(folder).is_dir()]
        if missing:
            raise ValueError(f"peer-path={name}={path}: {missing[0]} is not a folder")
        if PEERS[name].package and not holds(PEERS[name].package, path.split(os.pathsep)):
            raise ValueError(f"peer-path={name}={path}: must hold the package {PEERS[name].package}")


def holds(package: str, folders: Sequence[str]) -> bool:
    """Whether a dotted package lies in one of the folders; nothing is imported."""
    spec, found = None, list(folders)
    for index in range(package.count(".") + 1):
        spec = importlib.machinery.PathFinder.find_spec(package.split(".")[index], found)
        if spec is None:
            return False
        found = list(spec.submodule_search_locations or [])
    return True


def not_installed(peer: Peer, path: str | None) -> str:
    """Why a peer cannot run here, empty where it can."""
    if path is not None or not peer.package or importlib.util.find_spec(peer.package):
        return ""
    if peer.package.partition(".")[0] == "sonicmoe":
        return f"not installed: {peer.source}; its package has this one's name, so its folder must be given with --peer-path"
    return f"not installed: package {peer.package}, {peer.source}"


def write_inputs(case: cases.Case, routing: Routing, folder: Path) -> None:
    """The file that every peer reads: slots that are sentinels are left out."""
    used = (routing.expert_index >= 0) & (routing.expert_index < routing.num_experts)
    tensors = {name: getattr(case, name) for name in ("x", "w_up", "w_down", "b_up", "b_down", "dout")}
    tensors |= {name: getattr(routing, name)[used] for name in ("token_index", "expert_index", "score")}
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}, folder / "inputs.pt")


def compare(
    problem: benchmark.Problem,
    names: Sequence[str],
    paths: Mapping[str, str],
    *,
    test: bool,
    started: Callable[[str], None],
    timeout_s: float = TIMEOUT_S,
    logs: Path | None = None,
) -> list[dict[str, Any]]:
    """What became of ours and of each peer, in this order: ``name``, and ``status`` with what belongs to it.

    "ran": rows, times (variant -> fields of `timing.Timing`), saved_mib, peak_mib and, with the test, errors. "failed" and "not installed":
    why, in one line.

    Args:
        names: of `PEERS`.
        paths: name -> folders, separated as in PATH, that go onto the peer's PYTHONPATH before this process's.
        test: compare with the oracle.
        started: told the title of each peer as it starts, and "oracle".
        timeout_s: for each process; one that takes longer is stopped and has failed, the others run all the same.
        logs: a folder for what each process prints, NAME.log.

    Raises:
        ValueError: there is not enough room for the files.
    """
    peers = {"ours": OURS, **{name: PEERS[name] for name in names}}
    with tempfile.TemporaryDirectory(prefix="sonicmoe-peers-") as temporary:
        folder = Path(temporary)
        rows = prepare(problem, len(peers), folder)
        results = {}
        for name, peer in peers.items():
            started(peer.title)
            request = request_of(problem, peer, test=test)
            results[name] = _run_one(request, peer, paths.get(name), folder, folder / name, timeout_s=timeout_s)
            if logs and (folder / name / "log").exists():
                shutil.copyfile(folder / name / "log", logs / f"{name}.log")
        started("oracle" if test else "done")
        judge = Judge(problem, folder) if test else None
        for name, result in results.items():
            result["name"] = peers[name].title
            if result["status"] == "ran":
                result |= {"rows": rows, "errors": judge.errors(folder / name / "outputs.pt") if judge else {}}
    return list(results.values())


def prepare(problem: benchmark.Problem, peers: int, folder: Path) -> int:
    """Draw the problem, route it once, and leave the device to the peers; returns R."""
    case = problem.make_case()
    size = sum(tensor.nbytes for tensor in vars(case).values() if isinstance(tensor, torch.Tensor))
    needed, free = size * (1 + peers), shutil.disk_usage(folder).free
    if needed > free:
        gib = f"{needed / 2**30:.1f} GiB for files in {folder.parent}, must be at most the {free / 2**30:.1f} GiB that are free there"
        raise ValueError(f"peers: need {gib}; TMPDIR names another folder")
    with torch.no_grad():
        routing = problem.router.route(linear(case.x, case.router_weight))
    write_inputs(case, routing, folder)
    rows = int(((routing.expert_index >= 0) & (routing.expert_index < routing.num_experts)).sum())
    del case, routing
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _run_one(request: Mapping[str, Any], peer: Peer, path: str | None, inputs: Path, folder: Path, *, timeout_s: float) -> dict[str, Any]:
    why = not_installed(peer, path)
    if why:
        return {"status": "not installed", "why": why}
    folder.mkdir()
    (folder / "inputs.pt").symlink_to(inputs / "inputs.pt")
    (folder / "request.json").write_text(json.dumps(request))
    return run_worker(folder, path, timeout_s=timeout_s)


def request_of(problem: benchmark.Problem, peer: Peer, *, test: bool) -> dict[str, Any]:
    """What the worker is told beside the inputs."""
    return {
        "adapter": peer.adapter,
        "thiek": list(problem.thiek),
        "device": str(problem.device),
        "slots_per_token": problem.thiek.K if problem.router.method == "top_k" else None,
        "activation": problem.activation,
        "gate_up_layout": problem.gate_up_layout,
        "backend": problem.backend,
        "test": test,
        "effort": EFFORT,
    }


def run_worker(folder: Path, path: str | None, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Run worker.py on a folder with a request; what it answers, or why it gave no answer."""
    before = [] if path is None else [os.path.abspath(part) for part in path.split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*before, *map(os.path.abspath, sys.path)])}
    # -P: the adapters' folder must not be on the path, for they have the names of the packages that they import.
    # The peer's folders again as arguments: a .pth file of the site's packages may come before PYTHONPATH, as nvidia-cutlass-dsl's does.
    command = [sys.executable, "-P", str(WORKER), str(folder), *before]
    options = {"env": environment, "stdin": subprocess.DEVNULL, "timeout": timeout_s, "check": False}
    with open(folder / "log", "w+") as log:
        try:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, **options)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"took longer than {timeout_s:g} s and was stopped"}
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    try:
        return json.loads((folder / "result.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        last = f": {lines[-1]}" if lines else ""
        return {"status": "failed", "why": f"its process ended with exit status {ended.returncode}{last}"}


class Judge:
    """Errors against the oracle, which is computed once, after all peers have run and left the device."""

    def __init__(self, problem: benchmark.Problem, folder: Path) -> None:
        tensors = torch.load(folder / "inputs.pt", map_location=problem.device, weights_only=True, mmap=True)
        index = {name: tensors.pop(name) for name in ("token_index", "expert_index", "score")}
        routing = Routing(**index, num_tokens=problem.thiek.T, num_experts=problem.thiek.E, slots_per_token=None)
        options = {"activation": problem.activation, "gate_up_layout": problem.gate_up_layout}
        self.expected = oracle.experts(**tensors, routing=routing, **options)

    def errors(self, outputs: Path) -> dict[str, accuracy.Error]:
        """o of inference, o, dx, dw_up, dw_down, dscore and the biases' gradients."""
        got = torch.load(outputs, map_location="cpu", weights_only=True, mmap=True)
        found = {}
        for name, tensor in got.items():
            tensor_name = name.removesuffix(" inference")
            expected, size = self.expected[tensor_name], self.expected.get(f"{tensor_name} size")
            found[name] = accuracy.measure(tensor_name, tensor.to(expected.device), expected, size)
        return found


def mode_cells(problem: benchmark.Problem, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One cell of a recorded result for each mode of a peer that ran; of one that did not, one cell that says why."""
    described = {**problem.describe(), "peer": result["name"]}
    if result["status"] != "ran":
        return [{**described, "mode": None, "status": result["status"], "why": result["why"]}]
    _, H, I, _, _ = problem.thiek
    flops = timing.model_flops(result["rows"], H, I, gated=is_gated(problem.activation))
    cells = []
    for mode in MODES:
        own = result["times"][mode]
        bound_ms = result["times"]["bound forward+backward" if mode == "forward+backward" else "bound forward"]["ms"]
        errors = {name: error for name, error in result["errors"].items() if mode in _modes_of(name)}
        cells.append(
            {
                **described,
                "mode": mode,
                "status": "ran",
                **own,
                "tflops": timing.tflops(flops[mode], own["ms"]),
                "bound_ms": bound_ms,
                "ratio": bound_ms / own["ms"],
                "saved_mib": None if mode == "inference" else result["saved_mib"],
                "peak_mib": result["peak_mib"],
                "errors": {name: _json(error) for name, error in errors.items()},
            }
        )
    return cells


def _json(error: accuracy.Error) -> dict[str, float | None]:
    """JSON has no infinity; None is an error that is not finite."""
    return {key: value if math.isfinite(value) else None for key, value in error._asdict().items()}


def _modes_of(tensor: str) -> tuple[str, ...]:
    if tensor == "o inference":
        return ("inference",)
    return ("forward", "forward+backward") if tensor == "o" else ("forward+backward",)
