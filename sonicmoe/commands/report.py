"""``sonicmoe report``: the three standard loads, ending in PASS or FAIL."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonicmoe.thiek import Thiek

DESCRIPTION = """Judge and time the three standard loads: Standard, High throughput and More experts, in bfloat16 with top-K routing.
On a CPU they are scaled down (T and H to a sixteenth, I to an eighth, E to a quarter), and the report says so. PASS means that
every tensor of every load is as exact as its threshold demands; the times are shown, not judged."""

LOADS = {
    "Standard": "4096,4096,1024,128,8",
    "High throughput": "32768,4096,1024,128,8",
    "More experts": "4096,4096,1024,256,8",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--backend", default="auto", help="auto, hopper or reference (default: auto)")
    parser.add_argument("--seed", type=int, default=None, help="of all random numbers (default: a fresh one, which is printed)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0 for PASS, 1 for FAIL."""
    import secrets

    from rich.console import Console

    from routing import RouterConfig
    from sonicmoe import accuracy, backends, benchmark, devices, environment, thiek
    from sonicmoe.cases import DTYPES
    from sonicmoe.commands import tables

    device = devices.choose(args.device)
    backend = backends.resolve(args.backend, device, DTYPES["bf16"])
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    problems = []
    for name, text in LOADS.items():
        sizes = thiek.parse(text)
        if device.type == "cpu":
            sizes = scaled_down(sizes)
        problem = benchmark.Problem(sizes, RouterConfig(k=sizes.K), device, backend=backend, seed=seed, name=name)
        benchmark.check(problem, test=True)
        problems.append(problem)
    described = environment.describe(str(device))
    console = Console(stderr=args.json)
    threshold = accuracy.THRESHOLDS[DTYPES["bf16"]]
    cells, failures = [], []
    for problem in problems:
        if not args.json:
            scaled = "" if str(problem.thiek) == LOADS[problem.name] else f", {LOADS[problem.name]} scaled down for a CPU"
            console.rule(f"{problem.name}{scaled}", align="left")
            console.print(tables.title(problem, described), highlight=False)
        with tables.progress() as bar:
            task = bar.add_task(f"{problem.name}: comparing with the oracle", total=2)
            case = problem.make_case()
            layer = case.layer(backend)
            judged = benchmark.judge(problem, layer, case)
            bar.update(task, advance=1, description=f"{problem.name}: timing")
            memory = {"saved_mib": benchmark.saved_mib(layer, case), "peak_mib": benchmark.peak_mib(layer, case)}
            speed, rows = benchmark.time_trials(problem, [case])
        failures += [f"{problem.name}: {failure}" for failure in judged.failures]
        scale = {"scaled_down_from": LOADS[problem.name]} if str(problem.thiek) != LOADS[problem.name] else {}
        cells.append(tables.accuracy_cell(problem, judged) | scale)
        cells += [{**problem.describe(), **cell, **memory, "rows": rows.means(), **scale} for cell in speed]
        if not args.json:
            console.print(tables.accuracy_table(judged, threshold))
            console.print(tables.speed_table(speed))
    verdict = "FAIL" if failures else "PASS"
    if args.json:
        tables.print_json(described, cells, verdict=verdict, thresholds=threshold._asdict())
    else:
        for failure in failures:
            console.print(failure, style="red", markup=False, highlight=False)
        allowed = f"relative Frobenius error at most {threshold.whole:.1e}, of the worst block {threshold.worst_block:.1e}"
        console.print(f"{verdict}: {len(problems)} loads, every tensor's {allowed}", highlight=False)
    return 1 if failures else 0


def scaled_down(sizes: "Thiek") -> "Thiek":
    """T and H to a sixteenth, I to an eighth, E to a quarter: half a minute for all loads on two cores."""
    return sizes._replace(T=sizes.T // 16, H=sizes.H // 16, I=sizes.I // 8, E=sizes.E // 4)
