"""What a training step of one expert-parallel layer costs on G GPUs, by a small model with measured constants as inputs.

``python -m sonicmoe.parallel.scaling testing/results/*-expert-parallel-*.json`` prints the tables of docs/scaling.md; the recorded
runs of `sonicmoe bench --expert-parallel` that it is given are set against the model.

The model. Tokens choose their K experts evenly, so that a process with E/W of them gets a token with probability
``p = 1 - C(E - E/W, K) / C(E, K)`` and a token travels to (W - 1) p other processes, four times a step: there and back, forward and
backward. Within a host the copies share the GPU's links, between hosts its share of the network, both at the same time. Of the
exchange the first chunk's way there and the last one's way back are exposed, and whatever the products are too short to hide; each
chunk more adds its weight gradients to those before. Each use of the layer, and each chunk of it, costs time beside products and
exchange: the plans of who goes where, the host read, the copies' gathers and sums. The gradients of experts that several groups of W
processes own are reduced over the network under a layer's work; what takes longer than that work is the step.
Notation: T tokens of each GPU, H hidden size, I intermediate size, E experts, K experts per token, W processes that share the
experts, G GPUs in all.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sonicmoe.thiek import Thiek

BYTES = 2
"""Of an element: bfloat16."""


def _constant(value: float, source: str) -> float:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The model's inputs; ``source`` says for each whether it was measured, and where, or is an assumption."""

    products_tflops: float = _constant(
        577,
        "measured: 560, forward and backward of this library's layer at 32768,4096,1024,128,8 on one H100 80GB SXM (700 W), "
        "and 1/32 more in its partly empty tiles",
    )
    copy_gb_s: float = _constant(3000, "measured: device copy, bytes read and written, on the same GPU")
    host_gb_s: float = _constant(
        205, "measured: exchange alone on 2 H100s at 16384,4096,1024,128,8, its bytes over what 1 and 2 chunks have in common"
    )
    network_gb_s: float = _constant(45, "assumption: one 400 Gb/s card for each GPU, 90% used")
    journey_us: float = _constant(30, "measured: what each chunk more added to the four journeys there, beyond their bytes")
    peer_us: float = _constant(1.0, "assumption: each process on another host, beyond its bytes")
    use_us: float = _constant(1950, "measured: the step without exchange there, beyond products and what grows with chunks")
    chunk_us: float = _constant(490, "measured: what each chunk more added to it, beyond products and the addition of weight gradients")
    gpus_per_host: int = _constant(8, "assumption: as HGX H100 has")
    tile_rows: int = _constant(128, "fact: rows of a tile")

    def sources(self) -> list[tuple[str, float, str]]:
        return [(each.name, getattr(self, each.name), each.metadata["source"]) for each in dataclasses.fields(self)]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a layer is spread."""

    gpus: int
    """G."""
    expert: int
    """W, which divides G and E."""
    chunks: int = 1
    rounded: bool = False
    """Token rounding: no partly empty tiles."""
    by_host: bool = False
    """A hierarchical exchange: a token travels once to each host and is handed on within it."""
    hosts_per_token: int | None = None
    """Group-limited routing: a token's experts are on so many hosts at most."""


@dataclass(frozen=True)
class Step:
    """Milliseconds of one layer, forward and backward."""

    products: float
    """The experts' products, partly empty tiles included."""
    adding: float
    """Of the chunks' weight gradients."""
    overhead: float
    """Of the use and its chunks: plans, counts, the host read, the copies' gathers and sums, and the host's time for them."""
    exchange: float
    """All four journeys."""
    exposed: float
    reduction: float
    """Of the experts' gradients over the network."""
    near: float
    """Copies of a token that travel to each process within its host."""
    far: float
    """Copies of a token that travel to other hosts."""

    @property
    def total(self) -> float:
        return max(self.compute + self.exposed, self.reduction)

    @property
    def compute(self) -> float:
        """Without exchange."""
        return self.products + self.adding + self.overhead

    @property
    def efficiency(self) -> float:
        """Products alone over the whole."""
        return self.products / self.total


def reached(parts: int, thiek: Thiek, *, most: int | None = None) -> float:
    """The probability that a token has an expert in one part of ``parts`` equal ones; ``most`` parts are allowed to it."""
    own = thiek.E // parts
    if most is not None and most < parts:
        return most / parts * reached(most, thiek._replace(E=own * most))
    chosen = min(thiek.K, thiek.E)
    return 1 - math.comb(thiek.E - own, chosen) / math.comb(thiek.E, chosen)


def predict(thiek: Thiek, setup: Setup, constants: Constants | None = None) -> Step:
    """One step of one layer with T tokens on each GPU.

    Raises:
        ValueError: a setup that cannot be.
    """
    constants = Constants() if constants is None else constants
    T, H, I, E, K = thiek
    W, per_host = setup.expert, constants.gpus_per_host
    if E % W or setup.gpus % W:
        raise ValueError(f"expert={W}: must divide E={E} and gpus={setup.gpus}")
    hosts = max(1, W // per_host)
    within = min(W, per_host)
    fill = 1.0 if setup.rounded else 1 + constants.tile_rows / 2 / (T * K * W / E / setup.chunks)
    forward = 6 * T * K * H * I * fill / constants.products_tflops / 1e9
    gradients = 3 * H * I * E / W * BYTES / 1e6  # MB
    adding = (setup.chunks - 1) * 3 * gradients / constants.copy_gb_s  # two are read, one is written
    row = T * H * BYTES / 1e6  # MB of all tokens once, which is ms at 1 GB/s
    process_p = reached(W, thiek)
    if hosts > 1 and setup.hosts_per_token is not None:
        process_p = reached(hosts, thiek, most=setup.hosts_per_token) * reached(within, _one_host(thiek, hosts, setup.hosts_per_token))
    host_p = reached(hosts, thiek, most=setup.hosts_per_token)
    near = (within - 1) * process_p
    far = (W - within) * process_p
    if setup.by_host and hosts > 1:
        # What came from other hosts is handed on within this one, beside this host's own.
        near, far = near * hosts, (hosts - 1) * host_p
    journey = max(near * row / constants.host_gb_s, far * row / constants.network_gb_s)
    latency = 0.0 if W == 1 else (constants.journey_us + constants.peer_us * (W - within)) / 1e3
    journey_ms = journey + setup.chunks * latency
    overhead = 0.0 if W == 1 else (constants.use_us + constants.chunk_us * setup.chunks) / 1e3
    exposed = 0.0
    for products in (forward, 2 * forward + adding):
        there_and_back = 2 * journey_ms
        hidden = there_and_back * (setup.chunks - 1) / setup.chunks
        exposed += there_and_back - hidden + max(0.0, hidden - products)
    replicas = setup.gpus // W
    reduction = 2 * gradients * (replicas - 1) / replicas / constants.network_gb_s if replicas > 1 else 0.0
    return Step(3 * forward, adding, overhead, 4 * journey_ms, exposed, reduction, near, far)


def best(thiek: Thiek, setup: Setup, constants: Constants | None = None) -> tuple[Setup, Step]:
    """The setup with the number of chunks, of 1, 2, 4 and 8, that makes the shortest step."""
    tried = [dataclasses.replace(setup, chunks=chunks) for chunks in (1, 2, 4, 8)]
    steps = [(each, predict(thiek, each, constants)) for each in tried]
    return min(steps, key=lambda one: one[1].total)


def _one_host(thiek: Thiek, hosts: int, hosts_per_token: int) -> Thiek:
    """The experts of one host of a token's, and how many of them it chooses when it comes there."""
    return thiek._replace(E=thiek.E // hosts, K=max(1, round(thiek.K / min(hosts_per_token, hosts))))


SHAPES = (Thiek(16384, 4096, 1024, 128, 8), Thiek(16384, 7168, 2048, 256, 8))

SETUPS = (
    ("1 GPU", Setup(gpus=1, expert=1)),
    ("2 GPUs", Setup(gpus=2, expert=2)),
    ("8 GPUs", Setup(gpus=8, expert=8)),
    ("64 GPUs, experts on all", Setup(gpus=64, expert=64)),
    ("64 GPUs, experts within a host", Setup(gpus=64, expert=8)),
    ("64 GPUs, on all, by host", Setup(gpus=64, expert=64, by_host=True)),
    ("64 GPUs, by host, 3 hosts a token, rounded", Setup(gpus=64, expert=64, by_host=True, hosts_per_token=3, rounded=True)),
    ("1,024 GPUs, experts within a host", Setup(gpus=1024, expert=8)),
    ("1,024 GPUs, experts on 64", Setup(gpus=1024, expert=64)),
    ("1,024 GPUs, on 64, by host, 3 hosts a token, rounded", Setup(gpus=1024, expert=64, by_host=True, hosts_per_token=3, rounded=True)),
)


def table(thiek: Thiek, constants: Constants | None = None) -> str:
    """A Markdown table of SETUPS."""
    lines = [
        "| setup | chunks | products, ms | overhead, ms | exchange, ms | exposed, ms | gradients' reduction, ms | step, ms | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, setup in SETUPS:
        chosen, step = best(thiek, setup, constants)
        numbers = (step.products, step.overhead, step.exchange, step.exposed, step.reduction, step.total)
        lines.append(f"| {name} | {chosen.chunks} | {' | '.join(f'{number:.1f}' for number in numbers)} | {step.efficiency:.0%} |")
    return "\n".join(lines)


def comparison(results: Sequence[dict[str, Any]], constants: Constants | None = None) -> str:
    """A Markdown table of recorded training steps, those of the default transport and of top-K, beside the model."""
    lines = [
        "| ranks | T,H,I,E,K of a rank | chunks | without exchange, ms | exchange, ms | exposed, ms | step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = [cell for result in results for cell in result["cells"]]
    for cell in sorted(cells, key=lambda cell: (cell["ranks"], cell.get("chunks", 1))):
        if (cell["mode"], cell.get("transport"), cell["routing"]) != ("forward+backward", "all_to_all", "top_k"):
            continue
        step = predict(Thiek(*cell["thiek"]), Setup(gpus=cell["ranks"], expert=cell["ranks"], chunks=cell["chunks"]), constants)
        pairs = ((step.compute, "compute_ms"), (step.exchange, "exchange_ms"), (step.exposed, "exposed_ms"), (step.total, "ms"))
        numbers = " | ".join(f"{says:.1f} / {cell[name]:.1f}" for says, name in pairs)
        lines.append(f"| {cell['ranks']} | {Thiek(*cell['thiek'])} | {cell['chunks']} | {numbers} |")
    return "\n".join(lines)


def document(results: Sequence[dict[str, Any]]) -> str:
    """The generated part of docs/scaling.md."""
    inputs = [f"| {name} | {value:g} | {source} |" for name, value, source in Constants().sources()]
    parts = ["\n".join(["| input | value | where it comes from |", "|---|---|---|", *inputs])]
    parts.append(f"The model / what was measured (`testing/results/`), forward and backward:\n\n{comparison(results)}")
    parts += [f"T,H,I,E,K = {thiek} on each GPU:\n\n{table(thiek)}" for thiek in SHAPES]
    return "\n\n".join(parts)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(prog="python -m sonicmoe.parallel.scaling", description="The tables of docs/scaling.md.")
    parser.add_argument("results", nargs="*", type=Path, help="recorded runs of sonicmoe bench --expert-parallel")
    print(document([json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().results]))


if __name__ == "__main__":
    main()
