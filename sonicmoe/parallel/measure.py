"""How long an expert-parallel layer takes, how much of that its exchange adds, and how fast the exchange is next to the backend's own.

Four things are timed in turn, on all processes together, and the slowest process counts:

- step: the layer, forward or forward and backward;
- compute: the same with every exchange replaced by what it brought last time, so that nothing travels; step - compute is exposed;
- exchange: the same journeys one after the other, with nothing else to do;
- backend: ``all_to_all_single`` in equal parts, as often and with as many bytes to other processes as the rows of the journeys.

Notation: W processes, T tokens of each, H hidden size, I intermediate size, E experts, K experts per token.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from sonicmoe import timing
from sonicmoe.activations import is_gated
from sonicmoe.benchmark import Problem
from sonicmoe.moe import MoE
from sonicmoe.parallel.apply import expert_parallel
from sonicmoe.parallel.launch import Processes
from sonicmoe.parallel.layer import ExpertParallelism
from sonicmoe.parallel.transport import Announced, Flight, Leg, Transport

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Journey:
    """One use of `Transport.start`."""

    leg: Leg
    rows: torch.Tensor
    received: torch.Tensor


class Recorder:
    """A transport that remembers every journey of a pass, and in ``replay`` hands out what they brought without going anywhere."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.group = transport, transport.group
        self.journeys: list[Journey] = []
        self.replay, self._next = False, 0
        self._announced: Announced | None = None
        self._rooms: list[torch.Tensor] = []

    def restart(self, *, replay: bool) -> None:
        """Before each pass."""
        self.replay, self._next, self._next_room = replay, 0, 0
        if not replay:
            self.journeys.clear()
            self._rooms.clear()

    def announce(self, counts: torch.Tensor, **sizes: int | None) -> Announced:
        if not self.replay:
            announced = self.transport.announce(counts, **sizes)
            legs = announced.legs()
            self._announced = replace(announced, legs=lambda: legs)
        return self._announced

    def room(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """In a replay what landed in it before is there."""
        if not self.replay:
            self._rooms.append(self.transport.room(like, rows))
        self._next_room += 1
        return self._rooms[self._next_room - 1]

    def start(self, leg: Leg, rows: torch.Tensor, received: torch.Tensor | None = None) -> Flight:
        if self.replay:
            journey = self.journeys[self._next]
            self._next += 1
            return _Arrived(journey.received.detach())
        flight = self.transport.start(leg, rows, received)
        # Without its place in the graph: a replay makes another.
        self.journeys.append(Journey(leg, rows.detach(), flight.rows.detach()))
        return flight


@dataclass(frozen=True)
class _Arrived:
    rows: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.rows


def measure(problem: Problem, processes: Processes, *, repeats: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """One cell for each of MODES, in the format of recorded results; a collective.

    Args:
        problem: the layer, with T tokens on each process.
        repeats: rounds that are timed; as many as take about two seconds if None.
        options: of `expert_parallel`.
    """
    case = problem.make_case()
    layer = expert_parallel(case.layer(problem.backend), processes.expert, src_data_rank=None, **options)
    own = case.with_fresh_tokens(problem.seed + 1 + processes.rank)
    x, dout = own.x.detach().requires_grad_(), own.dout
    del case, own
    peaks = {mode: processes.gather(_peak_mib(_pass(layer, x, dout, mode), processes.device)) for mode in MODES}
    with torch.no_grad():
        counts = layer(x, return_router=True)[1].counts
    _, H, I, E, _ = problem.thiek
    W = processes.expert.size()
    rows = counts.sum().item() / W
    busiest = counts.view(W, -1).sum(1).max().item()
    flops = timing.model_flops(rows, H, I, gated=is_gated(problem.activation))
    bound_sizes = problem.thiek._replace(E=E // W)
    bounds = timing.gemm_bound_variants(bound_sizes, dtype=x.dtype, device=x.device, gated=is_gated(problem.activation))
    parallelism = layer.parallelism
    cells = []
    for mode in MODES:
        layer.parallelism = parallelism
        variants = {"step": _pass(layer, x, dout, mode), "bound": lambda mode=mode: bounds[f"bound {mode}"].run(None)}
        sent = 0.0
        if W > 1:
            recorder = Recorder(parallelism.transport)
            recorded = ExpertParallelism(recorder, parallelism.chunks)
            variants |= _exchange_variants(layer, recorder, recorded, parallelism, _pass(layer, x, dout, mode))
            sent = sum(_bytes_to_others(journey, parallelism.group) for journey in _of_tokens(recorder))
        times = _time(variants, processes, repeats)
        cells.append(
            {
                **problem.describe(),
                "name": f"expert_parallel/{W}",
                "mode": mode,
                "ranks": W,
                "transport": options.get("transport", "all_to_all"),
                "chunks": parallelism.chunks,
                **_numbers(times, flops[mode], sent),
                "rows": {"mean": rows, "busiest_rank": busiest},
                "peak_mib": peaks[mode],
            }
        )
    return cells


def _pass(layer: MoE, x: torch.Tensor, dout: torch.Tensor, mode: str) -> Callable[[], None]:
    leaves = [x, *layer.parameters()]

    def run() -> None:
        if mode == "forward":
            layer(x)
        else:
            torch.autograd.grad(layer(x), leaves, dout)

    return run


def _exchange_variants(
    layer: MoE, recorder: Recorder, recorded: ExpertParallelism, parallelism: ExpertParallelism, run: Callable[[], None]
) -> dict[str, Callable[[], None]]:
    """The variants compute, exchange and backend, after one recorded pass."""
    layer.parallelism = recorded
    recorder.restart(replay=False)
    run()
    layer.parallelism = parallelism
    transport, group = parallelism.transport, parallelism.group
    processes = dist.get_world_size(group)

    def compute() -> None:
        recorder.restart(replay=True)
        layer.parallelism = recorded
        try:
            run()
        finally:
            layer.parallelism = parallelism

    def exchange() -> None:
        for journey in recorder.journeys:
            transport.start(journey.leg, journey.rows).wait()

    parts = []
    for journey in _of_tokens(recorder):
        width = journey.rows.shape[1] * journey.rows.element_size()
        equal = math.ceil(_bytes_to_others(journey, group) / width / (processes - 1))
        parts.append(journey.rows.new_empty(2, equal * processes, journey.rows.shape[1]).normal_())

    def backend() -> None:
        for rows, received in parts:
            dist.all_to_all_single(received, rows, group=group)

    return {"compute": compute, "exchange": exchange, "backend": backend}


def _of_tokens(recorder: Recorder) -> list[Journey]:
    """The journeys of tokens, without those of indices and scores, which are a hundredth of the bytes."""
    widest = max(journey.rows.shape[1] for journey in recorder.journeys)
    return [journey for journey in recorder.journeys if journey.rows.shape[1] == widest]


def _bytes_to_others(journey: Journey, group: dist.ProcessGroup) -> float:
    """That a process sends to others in one journey, the mean over the processes; a collective."""
    sent = torch.as_tensor(journey.leg.sent, device=journey.rows.device)
    rows = sent.sum() - sent[dist.get_rank(group)]
    dist.all_reduce(rows, group=group)
    return rows.item() / dist.get_world_size(group) * journey.rows.shape[1] * journey.rows.element_size()


def _time(variants: dict[str, Callable[[], None]], processes: Processes, repeats: int | None) -> dict[str, timing.Timing]:
    """All variants in turn, round after round; of every sample the slowest process counts."""
    for _ in range(2):
        first = [_sample(run, processes) for run in variants.values()]
    if repeats is None:
        most = 50 if processes.device.type == "cuda" else 8
        repeats = int(processes.largest(max(5, min(most, 2000 / max(sum(first), 1e-3)))))
    samples = torch.tensor([[_sample(run, processes) for run in variants.values()] for _ in range(repeats)], dtype=torch.float64)
    slowest = processes.all_reduce(samples.to(processes.device), op=dist.ReduceOp.MAX).cpu()
    found = {}
    for name, column in zip(variants, slowest.T.tolist(), strict=True):
        quartiles = statistics.quantiles(column, n=4, method="inclusive") if len(column) > 1 else column * 3
        found[name] = timing.Timing(quartiles[1], quartiles[2] - quartiles[0], len(column))
    return found


def _sample(run: Callable[[], None], processes: Processes) -> float:
    """Milliseconds of one call on this process, begun on all at once."""
    processes.barrier()
    if processes.device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _numbers(times: dict[str, timing.Timing], flops: float, sent: float) -> dict[str, Any]:
    step, bound = times["step"], times["bound"]
    numbers = {**step._asdict(), "tflops": timing.tflops(flops, step.ms), "bound_ms": bound.ms, "ratio": bound.ms / step.ms}
    compute, exchange, backend = (times[name].ms if name in times else None for name in ("compute", "exchange", "backend"))
    exposed = 0.0 if compute is None else step.ms - compute
    numbers |= {"compute_ms": step.ms if compute is None else compute, "exchange_ms": exchange or 0.0, "backend_ms": backend or 0.0}
    numbers |= {"exposed_ms": exposed, "exposed_share": exposed / step.ms, "sent_mib": sent / 2**20}
    if exchange:
        numbers |= {"bus_gb_s": sent / exchange / 1e6, "backend_bus_gb_s": sent / backend / 1e6, "bandwidth_ratio": backend / exchange}
    return numbers


def _peak_mib(run: Callable[[], None], device: torch.device) -> float | None:
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20
