"""``python -m cute_runtime``: build kernel objects, list the variants, inspect the machine code."""

import argparse
import contextlib
import fnmatch
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cute_runtime.builder import KernelCompileError, MissingToolError, build_all
from cute_runtime.discover import prebuilt_folders, prebuilt_variants
from cute_runtime.objects import CorruptObjectError
from cute_runtime.resources import Resources, cuobjdump, read_resources
from cute_runtime.sources import is_host_code
from cute_runtime.variant import Variant

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 where a kernel does not compile, 2 where the request or the machine is at fault (one line on stderr)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, MissingToolError, CorruptObjectError, FileNotFoundError) as error:
        print(f"cute_runtime: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cute_runtime", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="compile kernels for sm_90a into shared objects; needs no GPU")
    _add_selection(build)
    build.add_argument("--out", required=True, metavar="DIR", help="folder for NAME.so; objects that are up to date are kept")
    build.add_argument("--jobs", type=_positive, default=os.cpu_count(), metavar="N", help="kernels compiled at once (default: the cores)")
    build.add_argument("--quiet", action="store_true", help="no progress display and no list of results")
    build.add_argument("--json", action="store_true", help="print the objects' paths as JSON")
    _add_check(build)
    build.set_defaults(run=_build)

    listing = commands.add_parser("list", help="list the variants that are built beforehand")
    _add_selection(listing)
    listing.add_argument("--json", action="store_true", help="print name, kernel and params as JSON")
    listing.set_defaults(run=_list)

    inspect = commands.add_parser("inspect", help="registers, shared and local memory, and instruction counts of built kernels")
    _add_selection(inspect)
    inspect.add_argument("--dir", metavar="DIR", help="folder of kernel objects (default: where load() finds prebuilt ones)")
    inspect.add_argument("--jobs", type=_positive, default=os.cpu_count(), metavar="N", help="kernels read at once (default: the cores)")
    inspect.add_argument("--json", action="store_true", help="print the numbers as JSON")
    _add_check(inspect)
    inspect.set_defaults(run=_inspect)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--package", action="append", metavar="P", help="only this package's variants; repeatable")
    parser.add_argument("--variant", action="append", metavar="NAME", help="exactly this variant, prebuilt or not; repeatable")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where a kernel uses local memory or more registers than a block gets"
    )
    parser.add_argument(
        "--wgmma", action="append", default=[], metavar="GLOB", help="with --check, also where such a variant has no wgmma; repeatable"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer from 1")
    return int(text)


def _selected(args: argparse.Namespace) -> list[Variant]:
    if args.variant:
        if args.package:
            raise ValueError("--variant: must not be combined with --package")
        return [Variant.from_name(name) for name in dict.fromkeys(args.variant)]
    return prebuilt_variants(args.package)


def _build(args: argparse.Namespace) -> int:
    variants = _selected(args)
    _prepare_check(args)
    console = _console(quiet=args.quiet)
    with _progress("compiling", len(variants), console) as advance:

        def on_done(variant: Variant, failure: KernelCompileError | None) -> None:
            advance(variant.name)

        failures = build_all(variants, args.out, jobs=args.jobs, on_done=on_done)
    for failure in failures:
        print(f"{failure.log.read_text(errors='replace').rstrip()}\ncute_runtime: {failure}", file=sys.stderr)
    failed = {failure.variant for failure in failures}
    paths = {variant.name: Path(args.out) / f"{variant.name}.so" for variant in variants if variant not in failed}
    if args.json:
        print(json.dumps({name: str(path) for name, path in paths.items()}, indent=2))
    else:
        console.print(f"{len(paths)} of {len(variants)} kernels in {args.out}")
    faults = _report_faults(args, _read_all(list(paths.values()), args.jobs, console), console) if args.check else 0
    return 1 if failures or faults else 0


def _read_all(paths: list[Path], jobs: int, console: "Console") -> list[Resources]:
    """The resources of many objects, ``jobs`` at a time; nearly all of it is the disassembler's time. Host code has none."""
    paths = [path for path in paths if not is_host_code(Variant.from_name(path.stem).kernel)]
    with _progress("reading", len(paths), console) as advance, ThreadPoolExecutor(jobs) as pool:
        found = []
        for path, functions in zip(paths, pool.map(read_resources, paths), strict=True):
            advance(path.stem)
            found += functions
        return found


def _report_faults(args: argparse.Namespace, resources: list[Resources], console: "Console") -> int:
    """How many faults there are; each is a line on stderr."""
    faults = []
    for one in resources:
        faults += one.faults(wgmma=any(fnmatch.fnmatchcase(one.variant, glob) for glob in args.wgmma))
    for fault in faults:
        print(f"cute_runtime: {fault}", file=sys.stderr)
    if not faults:
        console.print(f"{len(resources)} functions checked: no local memory, registers within a block's")
    return len(faults)


def _prepare_check(args: argparse.Namespace) -> None:
    """Refuse, before anything is compiled, what could not be checked afterwards."""
    if args.wgmma and not args.check:
        raise ValueError(f"--wgmma {args.wgmma[0]}: must come with --check")
    if args.check:
        cuobjdump()


def _console(*, quiet: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def _progress(what: str, total: int, console: "Console") -> Iterator[Callable[[str], None]]:
    """A bar on stderr; the function inside counts one thing more and shows its name."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=name)


def _list(args: argparse.Namespace) -> int:
    variants = _selected(args)
    if args.json:
        print(json.dumps([{"name": v.name, "kernel": v.kernel, "params": dict(v.params)} for v in variants], indent=2))
    else:
        print("\n".join(variant.name for variant in variants))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    paths = [_object_of(variant, args.dir) for variant in _selected(args)]
    _prepare_check(args)
    console = _console(quiet=not args.check)
    resources = _read_all(paths, args.jobs, console)
    if args.json:
        print(json.dumps([asdict(one) for one in resources], indent=2))
    elif not args.check:
        _print_table(resources)
    return 1 if args.check and _report_faults(args, resources, console) else 0


def _object_of(variant: Variant, folder: str | None) -> Path:
    folders = [Path(folder)] if folder else prebuilt_folders(variant.kernel)
    for path in (place / f"{variant.name}.so" for place in folders):
        if path.is_file():
            return path
    raise ValueError(f"{variant.name}: no object in {', '.join(map(str, folders))}; make it with python -m cute_runtime build --out DIR")


def _print_table(resources: list[Resources]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption="stack and local: bytes per thread; shared: static bytes per block")
    table.add_column("variant", no_wrap=True)
    for heading in ("registers", "threads", "stack", "local", "shared", "instructions", "HGMMA", "LDL", "STL"):
        table.add_column(heading, justify="right")
    for one in resources:
        numbers = (
            one.registers,
            one.threads,
            one.stack_bytes,
            one.local_bytes,
            one.static_shared_bytes,
            one.instructions,
            one.hgmma,
            one.ldl,
            one.stl,
        )
        table.add_row(one.variant, *map(str, numbers), style="red" if one.uses_local_memory else "")
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
