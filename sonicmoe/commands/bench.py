"""``sonicmoe bench``: judge and time one layer."""

import argparse

DESCRIPTION = """Judge one MoE layer against the float64 oracle, then time it in inference, forward, forward+backward and backward next
to the GEMM bound, its products alone. Normally distributed data. Exit code 1 where an error is above its threshold."""

_ROUTINGS = ("top_k", "nearest", "up", "down", "stochastic", "balanced")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from dispatch.operators import BACKENDS
    from sonicmoe.activations import ACTIVATIONS, LAYOUTS
    from sonicmoe.cases import DTYPES

    parser.description = DESCRIPTION
    parser.add_argument(
        "--thiek", required=True, metavar="T,H,I,E,K", help="tokens, hidden size, intermediate size, experts, experts per token"
    )
    parser.add_argument("--routing", default="top_k", choices=_ROUTINGS, help="top_k, or token rounding in this mode (default: top_k)")
    parser.add_argument(
        "--tile-m", type=int, default=128, metavar="ROWS", help="rows per tile, of token rounding and of hardware rows (128)"
    )
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="times with fresh tokens and router (default: 1)")
    parser.add_argument("--activation", default="swiglu", choices=tuple(ACTIVATIONS), help="default: swiglu")
    parser.add_argument("--bias", action="store_true", help="give both projections a bias")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES), help="default: bf16")
    parser.add_argument("--layout", default="interleaved", choices=LAYOUTS, help="of gate and up in w_up (default: interleaved)")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="default: auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--seed", type=int, default=None, help="of all random numbers (default: a fresh one, which is printed)")
    parser.add_argument("--skip-test", action="store_true", help="time only")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where an error is above its threshold."""
    import secrets

    from rich.console import Console

    from routing import RouterConfig
    from sonicmoe import accuracy, backends, benchmark, devices, environment, thiek
    from sonicmoe.cases import DTYPES
    from sonicmoe.commands import tables

    sizes = thiek.parse(args.thiek)
    for name, value in (("T", sizes.T), ("trials", args.trials)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1 to be timed")
    method = {"method": "top_k"} if args.routing == "top_k" else {"method": "token_rounding", "mode": args.routing}
    device = devices.choose(args.device)
    problem = benchmark.Problem(
        sizes,
        RouterConfig(k=sizes.K, tile_m=args.tile_m, **method),
        device,
        dtype=args.dtype,
        activation=args.activation,
        bias=args.bias,
        gate_up_layout=args.layout,
        backend=backends.resolve(args.backend, device, DTYPES[args.dtype]),
        seed=secrets.randbelow(2**31) if args.seed is None else args.seed,
    )
    benchmark.check(problem, test=not args.skip_test)
    described = environment.describe(str(device))
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
