"""``sonicmoe input``: how long training steps wait for their input."""

import argparse
import sys
from pathlib import Path

DESCRIPTION = """Time one layer's forward+backward on batches (T, H) that come from pageable memory, from pinned memory, and through
sonicmoe.data.PrefetchLoader, next to a batch that is on the device already; and say which share of the steps' time is waiting for input.
On a CPU every way passes the batches through. Exit code 1 where the prefetched steps wait longer than --max-wait."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sonicmoe.commands import problem

    parser.description = DESCRIPTION
    problem.add_arguments(parser, thiek="32768,4096,1024,128,8")
    parser.add_argument("--gib", type=float, default=2.0, metavar="GIB", help="input of one group of steps (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="groups of each kind, whose medians count (default: 3)")
    parser.add_argument("--max-wait", type=float, metavar="SHARE", help="exit with 1 where prefetched steps wait longer, such as 0.01")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result here, such as testing/results/input-h100.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where the prefetched steps wait for a larger share of their time than --max-wait."""
    from rich.console import Console

    from sonicmoe import environment, input_wait
    from sonicmoe.commands import problem as options
    from sonicmoe.commands import tables
    from sonicmoe.training.files import replace_file

    if args.rounds < 1:
        raise ValueError(f"rounds={args.rounds}: must be at least 1")
    if args.max_wait is not None and not 0 <= args.max_wait <= 1:
        raise ValueError(f"max_wait={args.max_wait}: must be from 0 to 1")
    problem = options.read(args, what="timed")
    input_wait.check(problem, args.gib)
    if args.out is not None and not args.out.parent.is_dir():
        raise ValueError(f"out={str(args.out)!r}: must be in a folder that exists")
    described = environment.describe(str(problem.device))
    with tables.progress() as bar:
        task = bar.add_task("groups of steps", total=args.rounds * len(input_wait.KINDS))
        found = input_wait.measure(problem, gib=args.gib, rounds=args.rounds, on_round=lambda: bar.advance(task))
    cells = input_wait.summarize(problem, found, args.gib)
    if args.out is not None:
        with replace_file(args.out) as file:
            file.write((tables.result_json(described, cells) + "\n").encode())
    if args.json:
        tables.print_json(described, cells)
    else:
        console = Console()
        console.print(tables.title(problem, described), highlight=False)
        console.print(tables.input_table(cells))
    waited = next(cell["input_wait_share"] for cell in cells if cell["input"] == "prefetched")
    if args.max_wait is not None and waited > args.max_wait:
        print(f"prefetched steps wait for {waited:.2%} of their time, at most {args.max_wait:.2%} is asked for", file=sys.stderr)
        return 1
    return 0
