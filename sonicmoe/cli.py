"""The command line. A sub-command's module is imported when it is asked for, so that one works where another's needs are missing.

Exit codes: 0 done, 1 a check failed, 2 wrong usage (one line on stderr), 130 interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "doctor": "check the machine, and say what to do about what is wrong",
    "bench": "judge and time one layer of any size",
    "report": "judge and time the three standard loads, ending in PASS or FAIL",
    "profile": "show what a layer's or a script's steps spend their time on",
    "input": "measure how long steps wait for their input",
    "train": "train a small MoE language model on real text",
    "convert": "write a checkpoint's experts in another form",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str]) -> int:
    """Run ``sonicmoe argv...``; returns the exit code. argparse itself exits for --help and wrong usage."""
    # Read when torch is first imported. Threads that spin while they wait made a step on two busy cores 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = _Parser(prog="sonicmoe", description="Mixture-of-experts layers for Hopper GPUs, with a PyTorch reference.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv and argv[0] == name:
            module = importlib.import_module(f"sonicmoe.commands.{name}")
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except (ValueError, TypeError) as error:
        if os.environ.get("SONICMOE_DEBUG", "0") not in ("", "0"):
            raise
        print(f"sonicmoe {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sonicmoe {args.command}: interrupted", file=sys.stderr)
        return 130
