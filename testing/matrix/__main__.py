"""The matrix's command line: ``python -m testing.matrix plan|run|gate|selftest|ratchet|kernels``.

Exit status: 0 all is well, 1 a cell or the gate failed, 2 the input cannot be used (one line on stderr says why).
"""

import argparse
import fnmatch
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from testing.matrix import gate, history, plan, ratchet, report, report_html, runner
from testing.matrix.cells import DEFAULT_MATRIX, Matrix, Profile, load_matrix
from testing.matrix.kernels import matrix_variants
from testing.matrix.located import MatrixError
from testing.matrix.results import FAILED, find_results, read_recorded, write_atomically, write_result

OK, GATE_FAILED, BAD_INPUT = 0, 1, 2
HOPPER = (9, 0)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments, load_matrix(arguments.matrix))
    except MatrixError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; run again with --resume to go on from the cells already done", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testing.matrix", description="The matrix: plan its shards, run it, decide on it.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="plan|run|gate|selftest|ratchet|kernels")
    planner = commands.add_parser("plan", help="print balanced shards as one line of JSON for GitHub Actions")
    planner.add_argument("--shards", type=int, required=True, metavar="N", help="number of shards")
    planner.set_defaults(run=_plan)
    run = commands.add_parser("run", help="run the cells, or one shard of them, and write results and reports")
    run.add_argument("--shard", default="1/1", metavar="I/N", help="which shard of how many, counted from 1 (default: %(default)s)")
    run.add_argument("--out", type=Path, default=Path("matrix_results"), metavar="DIR", help="where results go (default: %(default)s)")
    run.add_argument("--resume", action="store_true", help="go on from the cells that an interrupted run finished")
    run.set_defaults(run=_run)
    decide = commands.add_parser("gate", help="merge results and decide; exits with 1 when the gate fails")
    decide.add_argument("results", nargs="+", metavar="RESULT", help="result files, or folders that hold them")
    decide.add_argument("--expect-profile", metavar="NAME", help="refuse results of another profile")
    decide.add_argument("--out", type=Path, metavar="DIR", help="write merged.json, report.html and report.md there")
    decide.set_defaults(run=_gate)
    tester = commands.add_parser(
        "selftest", help="plant defects one at a time; exits with 1 when one survives the gate or untouched code fails"
    )
    tester.add_argument("--defects", metavar="GLOB", help="only the planted defects whose names match, such as '*bias*'")
    tester.add_argument("--out", type=Path, metavar="DIR", help="write selftest.json and selftest.md there")
    tester.add_argument(
        "--build",
        type=Path,
        metavar="DIR",
        help="run nothing; compile the kernels with the defects into DIR, without a GPU, for runs with SONICMOE_KERNELS=DIR",
    )
    tester.set_defaults(run=_selftest)
    tighten = commands.add_parser("ratchet", help="propose floors for the speed cells from recorded results, as a patch of the matrix file")
    tighten.add_argument("results", nargs="+", metavar="RESULT", help="result files, of shards or merged, or folders that hold shards")
    tighten.add_argument("--lower", action="store_true", help="propose floors that fall as well")
    tighten.add_argument("--write", action="store_true", help="write them into the matrix file instead of printing the patch")
    tighten.set_defaults(run=_ratchet)
    kernels = commands.add_parser("kernels", help="list the kernels that the cells need beside the prebuilt ones")
    kernels.set_defaults(run=_kernels)
    for command in (run, tester):
        command.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: one per core, four per GPU)")
        command.add_argument("--seed", type=int, metavar="S", help="repeat an earlier run's random numbers (default: fresh ones)")
    for command in (planner, run, tester):
        command.add_argument(
            "--profile", default="auto", help="cpu, hopper or auto: by whether there is an sm_90 GPU (default: %(default)s)"
        )
    for command in (run, decide):
        default = DEFAULT_MATRIX.parent / "results"
        command.add_argument("--history", type=Path, default=default, metavar="DIR", help="recorded results to compare with")
    for command in (planner, run):
        command.add_argument("--cells", metavar="GLOB", help="only the cells whose names match, such as 'models/*'")
    for command in (planner, run, decide, tester, tighten, kernels):
        command.add_argument("--matrix", type=Path, default=DEFAULT_MATRIX, metavar="FILE", help="default: testing/matrix.yaml")
        command.add_argument("--json", action="store_true", help="JSON on stdout and nothing else (as plan always does)")
    return parser


def _plan(arguments: argparse.Namespace, matrix: Matrix) -> int:
    profile = plan.profile_of(matrix, _profile_name(arguments.profile, _hopper_gpus))
    shards = plan.make_shards(plan.select(matrix, arguments.cells), profile, arguments.shards)
    print(json.dumps(plan.github_matrix(shards)))
    return OK


def _run(arguments: argparse.Namespace, matrix: Matrix) -> int:
    index, count = _shard(arguments.shard)
    machine = _machine(arguments, matrix)
    options = runner.RunOptions(
        shard_index=index,
        shard_count=count,
        out=arguments.out,
        jobs=machine.jobs,
        seed=_seed(arguments),
        pattern=arguments.cells,
        resume=arguments.resume,
        gpus=machine.gpus,
        command=_command(),
    )
    from sonicmoe import environment

    setup = runner.default_setup(matrix, machine.profile, machine.device)
    result = runner.run_shard(matrix, machine.profile, options, setup, environment.describe())
    passed = all(cell["status"] != FAILED for cell in result["cells"])
    _write_reports(arguments, matrix, result, passed, stem=f"shard-{index}-of-{count}" if count > 1 else "report")
    _show(arguments, matrix, result, passed)
    if not arguments.json:
        print(f"results and report: {arguments.out}")
    return OK if passed else GATE_FAILED


def _gate(arguments: argparse.Namespace, matrix: Matrix) -> int:
    verdict = gate.decide(matrix, find_results(arguments.results), arguments.expect_profile)
    merged = {**verdict.merged, "gate": "passed" if verdict.passed else "failed", "reasons": verdict.reasons}
    if arguments.out is not None:
        write_result(arguments.out / "merged.json", merged)
        _write_reports(arguments, matrix, merged, verdict.passed, stem="report")
    _show(arguments, matrix, merged, verdict.passed)
    return OK if verdict.passed else GATE_FAILED


def _selftest(arguments: argparse.Namespace, matrix: Matrix) -> int:
    if arguments.build is not None:
        return _build_defects(arguments, matrix)
    machine = _machine(arguments, matrix)
    from sonicmoe import environment
    from testing.matrix import selftest
    from testing.matrix.defects import EVERY
    from testing.matrix.planting_source import SourceDefect

    asked = {name: defect for name, defect in EVERY.items() if fnmatch.fnmatchcase(name, arguments.defects or "*")}
    defects = {name: defect.cell for name, defect in asked.items() if machine.gpus or not isinstance(defect, SourceDefect)}
    away = [name for name in asked if name not in defects]
    not_run = f"not run: {len(away)} defects in kernels, which need an sm_90 GPU"
    if not asked:
        raise MatrixError(f"--defects {arguments.defects}: matches none of the {len(EVERY)} defects")
    if not defects:
        raise MatrixError(f"--defects {arguments.defects}: matches defects in kernels only, which need an sm_90 GPU")
    if machine.gpus:
        _look_for_defects({name: asked[name] for name in defects if isinstance(asked[name], SourceDefect)}, matrix, machine.profile)
    options = selftest.SelftestOptions(machine.jobs, _cores(), _seed(arguments), machine.gpus, _command())
    setup = selftest.default_setup(matrix, machine.profile, machine.device)
    described = environment.describe()
    with runner.Steps(len(defects) + 1) as steps:
        tested = selftest.run_selftest(matrix, machine.profile, defects, setup, options, described, ended=steps.ended)
    if arguments.defects is None:
        tested = selftest.joined(tested, selftest.run_speed_selftest(matrix, options.seed))
    found = {
        **described,
        "profile": machine.profile.name,
        "seed": options.seed,
        "command": options.command,
        **tested.as_json(),
        "not_run": away,
    }
    if arguments.out is not None:
        write_result(arguments.out / "selftest.json", found)
        write_atomically(arguments.out / "selftest.md", selftest.markdown(tested) + (f"\n{not_run}\n" if away else ""))
    if arguments.json:
        print(json.dumps(found))
    else:
        selftest.print_table(_console(), tested)
        if away:
            print(not_run)
    return GATE_FAILED if tested.reasons else OK


def _build_defects(arguments: argparse.Namespace, matrix: Matrix) -> int:
    """Objects of the kernels with each defect, in a folder of the defect's name."""
    from cute_runtime import MissingToolError
    from cute_runtime.builder import tools
    from testing.matrix.defects_kernels import KERNEL_DEFECTS
    from testing.matrix.planting_build import build_planted, compile_in, planted_kernels

    if arguments.profile not in ("auto", "hopper"):
        raise MatrixError(f"--profile {arguments.profile}: kernels are of the hopper profile")
    defects = {name: defect for name, defect in KERNEL_DEFECTS.items() if fnmatch.fnmatchcase(name, arguments.defects or "*")}
    if not defects:
        raise MatrixError(f"--defects {arguments.defects}: matches none of the {len(KERNEL_DEFECTS)} defects in kernels")
    try:
        tools()
    except MissingToolError as error:
        raise MatrixError(str(error)) from None
    kernels = planted_kernels(defects, matrix, plan.profile_of(matrix, "hopper"))
    with runner.Steps(len(kernels)) as steps:
        jobs = _jobs(arguments) or _cores()
        failed = build_planted(defects, kernels, arguments.build, jobs=jobs, compile_one=compile_in, ended=steps.ended)
    if arguments.json:
        print(json.dumps({"folder": str(arguments.build), "kernels": len(kernels) - len(failed), "failed": failed}))
    else:
        print(f"{len(kernels) - len(failed)} of {len(kernels)} kernels with {len(defects)} defects in {arguments.build}")
    return GATE_FAILED if failed else OK


def _look_for_defects(defects: Mapping[str, Any], matrix: Matrix, profile: Profile) -> None:
    """Says how many kernels with the defects were not built beforehand; refuses where they cannot be compiled either."""
    from cute_runtime.sources import COMPILER, compiler_version
    from testing.matrix.planting_build import missing_kernels

    missing = missing_kernels(defects, matrix, profile)
    if not missing:
        return
    how = "build them anywhere with --build DIR, and name DIR in SONICMOE_KERNELS"
    if compiler_version() is None:
        raise MatrixError(f"{len(missing)} kernels with defects are not built from these sources, and {COMPILER} is not installed: {how}")
    print(
        f"{len(missing)} kernels with defects are not built from these sources: compiled on the way where the cache lacks them; {how}",
        file=sys.stderr,
    )


def _ratchet(arguments: argparse.Namespace, matrix: Matrix) -> int:
    results = [read_recorded(path) for path in find_results(arguments.results)]
    proposals = ratchet.propose(matrix, results, lower=arguments.lower)
    text = ratchet.edited(matrix.path, matrix.floors, proposals)
    if arguments.json:
        print(json.dumps([ratchet.as_json(proposal) for proposal in proposals]))
    else:
        ratchet.print_table(Console(stderr=True), proposals)
    if arguments.write:
        write_atomically(matrix.path, text)
    elif not arguments.json:
        print(ratchet.patch(matrix.path, text), end="")
    return OK


def _kernels(arguments: argparse.Namespace, matrix: Matrix) -> int:
    variants = matrix_variants(matrix)
    if arguments.json:
        print(json.dumps([{"name": variant.name, "kernel": variant.kernel} for variant in variants]))
    else:
        print("\n".join(variant.name for variant in variants))
    return OK


def _write_reports(arguments: argparse.Namespace, matrix: Matrix, result: dict[str, Any], passed: bool, *, stem: str) -> None:
    out = arguments.out
    try:
        records = history.recorded(arguments.history)
    except ValueError as error:
        raise MatrixError(str(error)) from None
    write_atomically(out / f"{stem}.html", report_html.html(matrix, result, passed=passed, records=records))
    write_atomically(out / f"{stem}.md", report.markdown(matrix, result, passed=passed, records=records))


def _show(arguments: argparse.Namespace, matrix: Matrix, result: dict[str, Any], passed: bool) -> None:
    if arguments.json:
        print(json.dumps(result))
    else:
        report.print_table(_console(), matrix, result, passed=passed)


def _console() -> Console:
    """A log file has no width of its own; 80 columns would fold every row of a table."""
    return Console() if sys.stdout.isatty() else Console(width=160)


class _Machine(NamedTuple):
    """What a run has to run on."""

    profile: Profile
    gpus: int
    device: str
    jobs: int


def _machine(arguments: argparse.Namespace, matrix: Matrix) -> _Machine:
    """The profile and the workers that the arguments and this machine come to."""
    gpus = 0 if arguments.profile == "cpu" else _hopper_gpus()
    profile = plan.profile_of(matrix, _profile_name(arguments.profile, lambda: gpus))
    if profile.name != "cpu" and gpus == 0:
        raise MatrixError(f"--profile {profile.name}: needs an sm_90 GPU, and none is visible here")
    jobs = _jobs(arguments) or (min(4 * gpus, _cores()) if gpus else _cores())
    return _Machine(profile, gpus, "cuda" if gpus else "cpu", jobs)


def _jobs(arguments: argparse.Namespace) -> int | None:
    if arguments.jobs is not None and arguments.jobs < 1:
        raise MatrixError(f"--jobs {arguments.jobs}: must be at least 1")
    return arguments.jobs


def _seed(arguments: argparse.Namespace) -> int:
    return secrets.randbits(32) if arguments.seed is None else arguments.seed


def _command() -> str:
    from sonicmoe import environment

    return environment.command("python", "-m", "testing.matrix", *sys.argv[1:])


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise MatrixError(f"--shard {text}: must be I/N, such as 2/8")
    return int(index), int(count)


def _profile_name(asked: str, gpus: Any) -> str:
    return asked if asked != "auto" else "hopper" if gpus() else "cpu"


def _hopper_gpus() -> int:
    """Visible GPUs of compute capability 9.0."""
    import torch

    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.get_device_capability(index) == HOPPER for index in range(torch.cuda.device_count()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
