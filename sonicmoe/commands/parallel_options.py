"""The options of commands that can spread experts over processes."""

import argparse

_DEFAULTS = {"transport": "all_to_all", "chunks": 1, "capacity": None, "timeout": 600.0}


def add_arguments(parser: argparse.ArgumentParser, *, transport: bool) -> None:
    """Add them; ``transport`` says whether there is a choice."""
    parser.add_argument("--expert-parallel", type=int, metavar="N", help="processes that share the experts; started by torchrun")
    if transport:
        parser.add_argument("--transport", default="all_to_all", choices=("all_to_all", "symmetric_memory"), help="default: all_to_all")
        parser.add_argument("--capacity", type=float, metavar="X", help="rows that fit, in even shares, in symmetric_memory (all rows)")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="parts in which tokens travel to their experts (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait for a process that does not come (600)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for one of them that would do nothing."""
    if args.expert_parallel is None:
        for name, default in _DEFAULTS.items():
            value = getattr(args, name, default)
            if value != default:
                raise ValueError(f"--{name} {value}: needs --expert-parallel")
    elif getattr(args, "capacity", None) is not None and args.transport != "symmetric_memory":
        raise ValueError(f"--capacity {args.capacity}: is for --transport symmetric_memory")
