"""A parallel cell: the layer on several processes of this machine, its results put together, against the float64 oracle.

A worker starts the processes anew for each cell: this module as a program, told who it is by the variables that torchrun sets. The
first one answers with JSON on its standard output.
"""

import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from testing.matrix.cells import ParallelCell, Profile
from testing.matrix.describe import split_of

_ANSWER = "answer: "


def measure_parallel(cell: ParallelCell, profile: Profile, seed: int) -> dict[str, Any]:
    """Checks and errors of one cell.

    Raises:
        RuntimeError: a process failed or did not answer in time, with the last line that it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(cell.processes)}
    order = pickle.dumps((cell, seed, profile.cell_timeout_s / 2))
    processes = []
    try:
        for rank in range(cell.processes):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "testing.matrix.checks_parallel"]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=own, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)
            processes.append(process)
            process.stdin.write(order)
            process.stdin.close()
        return _answer(processes, time.monotonic() + profile.cell_timeout_s)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _answer(processes: list[subprocess.Popen], deadline: float) -> dict[str, Any]:
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = [(rank, process) for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    for rank, process in failed:
        said = process.stdout.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"process {rank} ended with {process.poll()}: {said[-1] if said else 'it said nothing'}")
    late = [str(rank) for rank, process in enumerate(processes) if process.poll() is None]
    if late:
        raise RuntimeError(f"no answer in time from process {', '.join(late)}")
    lines = processes[0].stdout.read().decode().splitlines()
    return json.loads(next(line for line in lines if line.startswith(_ANSWER)).removeprefix(_ANSWER))


def main() -> None:
    """One process: take the order from standard input, answer where this is the first."""
    cell, seed, timeout_s = pickle.load(sys.stdin.buffer)
    from sonicmoe.parallel import launch

    processes = launch.start(cell.processes, "cuda" if cell.on_gpus else "cpu", timeout_s=timeout_s, command="train")
    measured = _measure(cell, seed, processes)
    if processes.rank == 0:
        print(_ANSWER + json.dumps(measured), flush=True)
    processes.barrier()


def _measure(cell: ParallelCell, seed: int, processes: Any) -> dict[str, Any]:
    """A collective; every process finds the same."""
    import torch

    from routing import RouterConfig
    from sonicmoe import accuracy, cases
    from sonicmoe.parallel import expert_parallel, judging

    spec = cell.routing
    router = RouterConfig(
        k=cell.thiek.K,
        method=spec.method,
        scoring=spec.scoring,
        renormalize=spec.renormalize,
        scale=spec.scale,
        num_groups=spec.num_groups,
        groups_per_token=spec.groups_per_token,
        group_score=spec.group_score,
        **({"mode": spec.mode, "tile_m": spec.tile_m} if spec.method == "token_rounding" else {}),
    )
    dtype = cases.DTYPES[cell.dtype]
    case = cases.make_case(cell.thiek, seed=seed, router=router, dtype=dtype, device=processes.device, bias=cell.bias)
    options: dict[str, Any] = {"transport": cell.transport, "chunks": cell.chunks, "src_data_rank": None}
    split = split_of(cell)
    if cell.transport == "symmetric_memory":
        options["max_tokens"] = max(split)
    layer = expert_parallel(case.layer(), processes.expert, **options)
    got, routing = judging.run_layer(layer, case, processes.expert, split)
    again, _ = judging.run_layer(layer, case, processes.expert, split)
    different = sorted(name for name in got if not torch.equal(got[name].view(torch.uint8), again[name].view(torch.uint8)))
    errors = {name: error._asdict() for name, error in accuracy.measure_all(got, case.oracle(routing)).items()}
    missed = abs(routing.token_index.shape[0] - cell.thiek.rows)
    checks = [
        {"name": "same bits", "passed": not different, "why": f"other bits in the second run: {', '.join(different)}" if different else ""},
        {
            "name": "rows",
            "passed": spec.method != "top_k" or missed == 0,
            "why": f"{routing.token_index.shape[0]} rows, must be {cell.thiek.rows}" if spec.method == "top_k" and missed else "",
        },
    ]
    scopes = ("whole", "worst_block")
    return {
        "checks": checks,
        "errors": {
            name: {scope: error[scope] if math.isfinite(error[scope]) else None for scope in scopes} for name, error in errors.items()
        },
    }


if __name__ == "__main__":
    main()
