"""``sonicmoe bench``: judge and time one layer."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonicmoe.benchmark import Problem

DESCRIPTION = """Judge one MoE layer against the float64 oracle, then time it in inference, forward, forward+backward and backward next
to the GEMM bound, its products alone. Normally distributed data. Exit code 1 where an error is above its threshold; the router's gradient,
whose few terms may cancel by chance, is judged relative to its size on average over their signs where it is smaller. With --peers
other implementations of the experts run beside this one on the same weights, inputs and routing, each in a process of its own. Under
torchrun, --expert-parallel N spreads the experts over N processes with T tokens each, and times the exchange next to the backend's own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sonicmoe.commands import parallel_options, problem
    from sonicmoe.peers import PEERS

    parser.description = DESCRIPTION
    problem.add_arguments(parser, required=True)
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="times with fresh tokens and router (default: 1)")
    parser.add_argument("--skip-test", action="store_true", help="time only")
    peers = f"run these beside the experts: {', '.join(PEERS)} (without a name: all)"
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=peers)
    parser.add_argument(
        "--peer-path",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a folder, or several separated as in PATH, that holds a peer and what it needs; may be given for several peers",
    )
    limit = "for each process of a comparison; one that takes longer is stopped, the others run all the same (default: 1200)"
    parser.add_argument("--peer-timeout", type=float, metavar="SECONDS", help=limit)
    parser.add_argument("--peer-logs", metavar="FOLDER", help="keep what each process of a comparison prints there, as NAME.log")
    parallel_options.add_arguments(parser, transport=True)
    parser.add_argument("--out", metavar="FILE", help="also write the result there, with --expert-parallel")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where an error is above its threshold."""
    from rich.console import Console

    from sonicmoe import accuracy, benchmark, environment
    from sonicmoe.cases import DTYPES
    from sonicmoe.commands import parallel_options, tables
    from sonicmoe.commands import problem as options

    if args.trials < 1:
        raise ValueError(f"trials={args.trials}: must be at least 1 to be timed")
    parallel_options.check(args)
    if args.expert_parallel is None and args.out is not None:
        raise ValueError(f"--out {args.out}: needs --expert-parallel")
    comparison = [option for option in ("peer_path", "peer_timeout", "peer_logs") if getattr(args, option) not in (None, [])]
    if args.peers is None and comparison:
        raise ValueError(f"{comparison[0].replace('_', '-')}: needs --peers")
    if args.expert_parallel is not None:
        if args.peers is not None:
            raise ValueError("--peers: runs on one GPU, must not be given with --expert-parallel")
        from sonicmoe.commands import bench_parallel

        return bench_parallel.run(args)
    problem = options.read(args, what="timed")
    if args.peers is not None:
        return _run_peers(args, problem)
    benchmark.check(problem, test=not args.skip_test)
    described = environment.describe(str(problem.device))
    console = Console(stderr=args.json)
    if not args.json:
        console.print(tables.title(problem, described), highlight=False)
    cells, judged = [], None
    with tables.progress() as bar:
        task = bar.add_task("drawing the problem", total=args.trials + (not args.skip_test))
        case = problem.make_case()
        layer = case.layer(problem.backend)
        if not args.skip_test:
            bar.update(task, description="comparing with the oracle")
            judged = benchmark.judge(problem, layer, case)
            cells.append(tables.accuracy_cell(problem, judged))
            bar.advance(task)
        memory = {"saved_mib": benchmark.saved_mib(layer, case), "peak_mib": benchmark.peak_mib(layer, case)}

        def trials():
            for trial in range(args.trials):
                bar.update(task, description="timing")
                yield case.with_fresh_tokens(problem.seed + trial) if trial else case
                bar.advance(task)

        effort = {} if args.trials == 1 else {"warmup_s": 0.0, "measure_s": 0.0, "min_repeats": 3}
        speed, rows = benchmark.time_trials(problem, trials(), **effort)
    cells += [{**problem.describe(), **cell, **memory, "rows": rows.means()} for cell in speed]
    if args.json:
        tables.print_json(described, cells)
    else:
        if judged:
            console.print(tables.accuracy_table(judged, accuracy.THRESHOLDS[DTYPES[args.dtype]]))
        console.print(tables.speed_table(speed))
        console.print(tables.rows_table(rows))
        console.print(f"saved for backward, beyond inputs and parameters: {memory['saved_mib']:.1f} MiB", highlight=False)
    return 1 if judged and judged.failures else 0


def _run_peers(args: argparse.Namespace, problem: "Problem") -> int:
    """Returns 0, or 1 where this library fails or has an error above its threshold; what peers do is shown, not judged."""
    from rich.console import Console

    from sonicmoe import accuracy, benchmark, environment
    from sonicmoe.cases import DTYPES
    from sonicmoe.commands import tables
    from sonicmoe.peers import PEERS, compare

    timeout_s = compare.TIMEOUT_S if args.peer_timeout is None else args.peer_timeout
    if not timeout_s > 0:
        raise ValueError(f"peer-timeout={timeout_s:g}: must be above 0 seconds")
    if args.trials != 1:
        raise ValueError(f"trials={args.trials}: must be 1 with --peers")
    paths = {}
    for text in args.peer_path:
        name, equals, path = text.partition("=")
        if not (equals and path):
            raise ValueError(f"peer-path={text!r}: must be NAME=FOLDER")
        paths[name] = path
    names = args.peers or list(PEERS)
    compare.check_names(names, paths)
    benchmark.check(problem, test=not args.skip_test)
    logs = None if args.peer_logs is None else Path(args.peer_logs)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    described = environment.describe(str(problem.device))
    console = Console(stderr=args.json)
    if not args.json:
        console.print(tables.title(problem, described), highlight=False)
    with tables.progress() as bar:
        task = bar.add_task("drawing the problem", total=len(names) + 2)
        results = compare.compare(
            problem,
            names,
            paths,
            test=not args.skip_test,
            timeout_s=timeout_s,
            logs=logs,
            started=lambda title: bar.update(task, advance=1, description=title),
        )
    cells = [cell for result in results for cell in compare.mode_cells(problem, result)]
    ours = results[0]
    failures = accuracy.failures(ours.get("errors", {}), accuracy.THRESHOLDS[DTYPES[args.dtype]])
    if args.json:
        tables.print_json(described, cells)
    else:
        tables.print_peers(console, cells)
        for failure in failures:
            console.print(f"{ours['name']}: {failure}", style="red", markup=False, highlight=False)
    return 1 if failures or ours["status"] != "ran" else 0
