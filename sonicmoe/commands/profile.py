"""``sonicmoe profile``: what a layer's or a script's steps spend their time on."""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonicmoe.names import MODES

if TYPE_CHECKING:
    from sonicmoe.benchmark import Problem
    from sonicmoe.profiling.analysis import Profile

DESCRIPTION = """Record steps with torch.profiler and show what one would read in Nsight Systems: the GPU's busy share, kernels by time
with what they achieve of their floors, memory operations, gaps with the host call that caused each, and copies from pageable memory
with the line of code that makes them. The steps are one layer's (--thiek), a script's (--script), or in a trace that was recorded
elsewhere (--trace). Writes a trace for Perfetto and an HTML page with a timeline. Exit code 1 below --min-busy."""

_WARMUP, _STEPS = 3, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sonicmoe.commands import problem
    from sonicmoe.profiling.analysis import GAP_US

    parser.description = DESCRIPTION
    problem.add_arguments(parser)
    parser.add_argument("--mode", default="forward+backward", choices=MODES, help="with --thiek (default: forward+backward)")
    parser.add_argument("--script", type=Path, metavar="FILE", help="a Python file that defines step(), or trains with an optimizer")
    parser.add_argument("--script-args", default="", metavar="ARGS", help="the script's arguments, in one word")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="analyse this Chrome trace of torch.profiler, run nothing")
    parser.add_argument("--warmup", type=int, default=_WARMUP, metavar="N", help="steps under the profiler that do not count (default: 3)")
    parser.add_argument("--steps", type=int, default=_STEPS, metavar="N", help="steps that count (default: 5)")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="with --trace: marked steps that do not count (default: 0)")
    parser.add_argument("--gap-us", type=float, default=GAP_US, metavar="US", help=f"least length of a gap (default: {GAP_US:g})")
    parser.add_argument("--min-busy", type=float, metavar="SHARE", help="exit with 1 where the GPU's busy share is below, such as 0.984")
    parser.add_argument("--out", type=Path, default=Path("profile_results"), metavar="DIR", help="for trace.json.gz and profile.html")
    parser.add_argument("--keep-trace", type=Path, metavar="FILE", help="also write the trace here (.json or .json.gz)")
    parser.add_argument("--trim", action="store_true", help="with --keep-trace: only what the analysis reads, without names of the machine")
    parser.add_argument("--nsys", type=Path, metavar="FILE", help="record with Nsight Systems instead, into FILE.nsys-rep")
    parser.add_argument("--inside-nsys", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print the tables as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where the busy share is below --min-busy; nsys's exit code with --nsys."""
    _check(args)
    if args.nsys is not None and not args.inside_nsys:
        return _drive_nsys(args)
    from rich.console import Console

    from sonicmoe.profiling import analysis, html, trace, trim

    if args.trace is not None:
        content = trace.load(args.trace)
        devices = ", ".join(dict.fromkeys(trace.parse(content).devices))
        text, described, cell = f"{args.trace.name}: {devices or 'no GPU named'}", {"device": devices or None}, {"name": args.trace.name}
    else:
        content, text, described, cell = _record(args)
        if args.inside_nsys:
            return 0
        trace.write(args.out / "trace.json.gz", content)
    if args.keep_trace is not None:
        trace.write(args.keep_trace, trim.trim(content) if args.trim else content)
    parsed = trace.parse(content)
    profile = analysis.analyse(parsed, gap_us=args.gap_us, skip=args.skip)
    trace.write_text(args.out / "profile.html", html.page(parsed, profile, title="SonicMoE profile", described=text))
    if args.json:
        _print_json(described, {**cell, **profile.as_json()})
    else:
        _print(Console(), profile, text)
        written = "profile.html" if args.trace else "trace.json.gz (ui.perfetto.dev), profile.html"
        print(f"{args.out}: {written}")
    return _judge(args, profile)


def _check(args: argparse.Namespace) -> None:
    sources = [name for name in ("thiek", "script", "trace") if getattr(args, name) is not None]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none of them"
        raise ValueError(f"{given}: must be exactly one of --thiek, --script, --trace")
    for name, least in (("warmup", 1), ("steps", 1), ("skip", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"{name}={getattr(args, name)}: must be at least {least}")
    for name, default, needs in _needing(args):
        if getattr(args, name) != default:
            raise ValueError(f"{name}={getattr(args, name)}: must come with --{needs}")
    if args.skip and args.trace is None:
        raise ValueError(f"skip={args.skip}: must come with --trace; steps that are run have --warmup")
    if args.trim and args.keep_trace is None:
        raise ValueError("--trim: must come with --keep-trace")
    if args.nsys is not None and args.json:
        raise ValueError("--json: must come without --nsys, whose summaries are text")
    if args.nsys is not None and args.trace is not None:
        raise ValueError("--nsys: must come with --thiek or --script, which it runs")
    if args.min_busy is not None and not 0 < args.min_busy <= 1:
        raise ValueError(f"min_busy={args.min_busy}: must be above 0 and at most 1")


def _needing(args: argparse.Namespace) -> Iterator[tuple[str, object, str]]:
    """(option, its default, what it must come with) of the options that would be passed over in silence."""
    from sonicmoe.commands.problem import DEFAULTS

    if args.thiek is None:
        yield from ((name, default, "thiek") for name, default in {**DEFAULTS, "mode": "forward+backward"}.items())
    if args.script is None:
        yield "script_args", "", "script"
    if args.trace is not None:
        yield from (("warmup", _WARMUP, "thiek or --script"), ("steps", _STEPS, "thiek or --script"))


def _record(args: argparse.Namespace) -> tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]:
    """(trace, a description in words, the environment and the cell of recorded results)."""
    import shlex

    from sonicmoe import benchmark, devices, environment
    from sonicmoe.commands import problem as options
    from sonicmoe.commands import tables
    from sonicmoe.profiling import annotate, nsys, peaks, record, script

    problem = options.read(args, what="profiled") if args.script is None else None
    device = problem.device if problem else devices.choose(args.device)
    on_gpu = device.type == "cuda"
    described = environment.describe(str(device))
    if problem:
        benchmark.check(problem, test=False)
    if args.inside_nsys:
        if not on_gpu:
            raise ValueError("--nsys: needs a GPU, and this machine has none that torch can use")
        recorder = nsys.CaptureRange(warmup=args.warmup, steps=args.steps)
    else:
        metadata = {"peaks": peaks.measure(device)} if on_gpu else {}
        recorder = record.Recorder(warmup=args.warmup, steps=args.steps, on_gpu=on_gpu, metadata=metadata)
    if problem is None:
        with annotate.annotated(on_gpu=on_gpu):
            content = script.record(args.script, shlex.split(args.script_args), recorder)
        text = f"{args.script.name} on {described['device']}, torch {described['versions']['torch']}"
        return content, text, described, {"name": args.script.name}
    with tables.progress() as bar:
        bar.add_task("recording", total=None)
        step, rows = _layer_step(problem, args.mode)
        with annotate.annotated(on_gpu=on_gpu, rows=rows):
            content = recorder.run(step)
    return content, f"{args.mode} of {tables.title(problem, described)}", described, {**problem.describe(), "mode": args.mode}


def _layer_step(problem: "Problem", mode: str) -> tuple[Callable[[], object], int]:
    """A function that runs the layer once, and the rows that its routing fills."""
    import torch

    from sonicmoe import benchmark

    case = problem.make_case()
    layer = case.layer(problem.backend)
    with torch.no_grad():
        rows = int(layer(case.x, return_router=True)[1].counts.sum())
    variant = benchmark.layer_variants(layer, case)[mode]
    return lambda: variant.run(variant.prepare()), rows


def _drive_nsys(args: argparse.Namespace) -> int:
    from sonicmoe.profiling import nsys

    position = sys.argv.index("profile") if "profile" in sys.argv else 0
    return nsys.drive(args.nsys, sys.argv[position + 1 :], say=lambda line: print(line, file=sys.stderr, flush=True))


def _print(console: Any, profile: "Profile", text: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from sonicmoe.profiling import html, tables

    if not console.is_terminal:
        console.width = 160
    console.print(text, highlight=False, markup=False)
    console.print(", ".join(f"{label} {value}" for label, value in tables.headline(profile)), style="bold", highlight=False, markup=False)
    if profile.needs_gpu:
        console.print(html.needs_gpu_text(profile), style="yellow", highlight=False, markup=False)
    for table in tables.all_tables(profile):
        shown = Table(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for label, numeric in table.columns:
            shown.add_column(label, justify="right" if numeric else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)


def _print_json(described: dict[str, Any], cell: dict[str, Any]) -> None:
    from sonicmoe.commands import tables

    tables.print_json(described, [cell])


def _judge(args: argparse.Namespace, profile: "Profile") -> int:
    if args.min_busy is None:
        return 0
    if not profile.busy:
        raise ValueError(f"min_busy={args.min_busy}: needs a trace with GPU activity")
    worst = min(one.share for one in profile.busy)
    if worst >= args.min_busy:
        return 0
    cause = profile.gap_causes[0] if profile.gap_causes else None
    most = f"; most of it: {cause.kind}, {cause.call} in {cause.operator or 'no operator'}, {cause.idle_us:.1f} us" if cause else ""
    print(f"GPU busy {worst:.2%}, at least {args.min_busy:.2%} is asked for{most}", file=sys.stderr)
    return 1
