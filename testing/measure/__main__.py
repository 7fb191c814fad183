"""``python -m testing.measure NAME...``: runs suites and records what they find.

Exit status: 0 all is well, 1 an item failed, 2 the input cannot be used (one line on stderr says why). What was not run, or was measured
where its bound does not hold, is neither passed nor failed.
"""

import argparse
import json
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testing.matrix.located import MatrixError
from testing.matrix.results import FAILED, write_atomically
from testing.measure import registry

OK, ITEM_FAILED, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, MatrixError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {arguments.out} has the items that had ended", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, registry.SUITES))
    suites = "\n".join(f"  {name:<{width}}  {about}" for name, about in registry.SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m testing.measure",
        description="Measures what the layer promises beside its speed, and judges it where a bound is stated.",
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="+", choices=[*registry.SUITES, "all"], metavar="NAME", help="suites to run, or all")
    parser.add_argument(
        "--out", type=Path, default=Path("measure_results.json"), metavar="FILE", help="where the result goes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few repeats, to see that everything runs; judges no speed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--items", metavar="GLOB", help="only the items whose names match, such as 'step/graph/*'")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat an earlier run's random numbers (default: fresh ones)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout and nothing else")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from sonicmoe import backends, devices, environment
    from testing.measure import report, run
    from testing.measure.items import Options

    device = devices.choose(arguments.device)
    backend = backends.resolve("auto", device, torch.bfloat16)
    if device.type == "cpu" and not arguments.quick:
        raise ValueError(f"device={str(device)!r}: full sizes need a GPU, on a CPU there must be --quick")
    _check_out(arguments.out)
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    options = Options(device, backend, arguments.quick, seed)
    names = list(dict.fromkeys(registry.SUITES if "all" in arguments.suites else arguments.suites))
    ran = {"suites": names, "items": arguments.items, "quick": options.quick, "seed": seed, "backend": backend}
    command = environment.command("python", "-m", "testing.measure", *sys.argv[1:])
    result = {**environment.describe(str(device)), "command": command, **ran, "complete": False, "cells": []}
    for cells in run.run_suites(names, options, pattern=arguments.items):
        result["cells"] += cells
        _write(arguments.out, result)  # what a killed run had measured is not lost
    result["complete"] = True
    _write(arguments.out, result)
    if arguments.json:
        print(json.dumps(result))
    else:
        report.print_result(report.console(), result)
        print(f"recorded in {arguments.out}")
    return ITEM_FAILED if any(cell["status"] == FAILED for cell in result["cells"]) else OK


def _check_out(path: Path) -> None:
    """Refuse before minutes of measuring what could not be written after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(path)!r}: cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise ValueError(f"out={str(path)!r}: must be a file, not a folder")


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write a result once what shows recorded results has read it."""
    from testing import readme_tables

    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    with tempfile.TemporaryDirectory(prefix="sonicmoe_measure.") as folder:
        write_atomically(Path(folder) / "result.json", text)
        for tables in readme_tables.TABLES:
            tables.markdown(Path(folder))
    write_atomically(path, text)


if __name__ == "__main__":
    sys.exit(main())
