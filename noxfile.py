"""What runs here runs in CI: each session does its own set-up, and ``-- ARGS`` go to the command behind it.

``nox -s matrix`` is the main job, ``nox -s tests`` the tests. With ``--no-venv`` nothing is installed: the packages
and tools of the machine are used, without network.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests"]
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
OUT = ROOT / "out"
APT_PACKAGES = {"bazel": "bazel-bootstrap", "cc": "gcc libc6-dev"}


class MissingToolError(Exception):
    """A program that is not on this machine and cannot be installed; the message says what to do."""


@dataclass(frozen=True)
class Outcome:
    """What one stage of the tests came to."""

    stage: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def interpreter(session: nox.Session, extra: str) -> str:
    """Installs the project with one of its extras; returns the Python that has it."""
    if not session.virtualenv.is_sandboxed:  # --no-venv
        return sys.executable
    constraints = os.environ.get("SONICMOE_CONSTRAINTS", "requirements/constraints.txt")
    session.install("--constraint", constraints, "--editable", f".[{extra}]", silent=False)
    return str(Path(session.bin) / "python")


def run(session: nox.Session, *command: str | Path, env: dict[str, str] | None = None) -> None:
    session.run(*map(str, command), env=env, external=True)


def find_tool(session: nox.Session, *names: str) -> str:
    """The path of the first of ``names`` on this machine; the last one is installed by apt where there is none and no ``--no-venv``.

    Raises:
        MissingToolError: there is none, and it could not be installed.
    """
    found = next(filter(None, map(shutil.which, names)), None)
    if found:
        return found
    packages, wanted = APT_PACKAGES[names[-1]], " or ".join(names)
    if not session.virtualenv.is_sandboxed:
        raise MissingToolError(f"no {wanted} on PATH, and --no-venv installs nothing: install {packages}, then run this again")
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    if shutil.which("apt-get") and (not as_root or shutil.which("sudo")):
        session.log(f"no {wanted} here: installing {packages}")
        try:
            run(session, *as_root, "apt-get", "update", "-qq")
            run(session, *as_root, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages.split())
        except CommandFailed:
            raise MissingToolError(f"apt-get could not install {packages}; install {wanted} by hand and run this again") from None
        found = shutil.which(names[-1])
    if found is None:
        raise MissingToolError(f"no {wanted} on PATH and no apt-get to install {packages} with: install it, then run this again")
    return found


def system_tool(session: nox.Session, *names: str) -> str:
    """The same for a session that is pointless without the tool: it ends with the message."""
    try:
        return find_tool(session, *names)
    except MissingToolError as error:
        session.error(str(error))


def bazel_environment(python: str) -> dict[str, str]:
    """The interpreter for Bazel's actions and tests, and its packages as part of their cache keys (see .bazelrc)."""
    script = "from importlib.metadata import version as v; import sys; print(sys.version.split()[0], *(v(n) for n in sys.argv[1:]))"
    names = ["torch", "nvidia-cutlass-dsl", "apache-tvm-ffi", "pytest"]
    versions = subprocess.run([python, "-c", script, *names], capture_output=True, text=True, check=True).stdout.split()
    toolchain = " ".join(f"{name}={version}" for name, version in zip(["python", *names], versions, strict=True))
    return {"PYTHON": python, "SONICMOE_TOOLCHAIN": toolchain}


def test_jobs() -> int:
    """Test processes at once; beyond eight, torch's start-up costs more memory than it saves time."""
    return max(1, min(os.cpu_count() or 1, 8))


def kernels_stage(session: nox.Session, python: str) -> tuple[int, int, int]:
    """Compiles every kernel, once: the stages after it read them from here."""
    try:
        return bazel_kernels(session, python, OUT / "kernels"), 0, 0
    except (CommandFailed, subprocess.CalledProcessError):
        return 0, 1, 0


def pytest_stage(
    session: nox.Session, python: str, arguments: list[str], environment: dict[str, str], *, jobs: int | None = None
) -> tuple[int, int, int]:
    """``jobs``: test processes at once."""
    jobs = test_jobs() if jobs is None else jobs
    report = OUT / "tests" / "pytest.xml"
    report.unlink(missing_ok=True)
    try:
        run(
            session,
            *(python, "-m", "pytest", "-q", "-n", str(jobs), "--dist=loadgroup", "--timeout=300", f"--junitxml={report}"),
            *arguments,
            env={"OMP_NUM_THREADS": "1", **environment},
        )
    except CommandFailed:
        if not report.exists():
            return 0, 1, 0
        ended_well = False
    else:
        ended_well = True
    counts = ET.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(counts.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return total - failed - skipped, failed if ended_well or failed else 1, skipped


def bazel_stage(session: nox.Session, python: str) -> tuple[int, int, int]:
    """Without an sm_90 GPU its tests are not started: Bazel would call a test passed of which every part was skipped."""
    bazel = find_tool(session, "bazelisk", "bazel")
    environment = bazel_environment(python)
    events = OUT / "tests" / "bazel-events.json"
    events.unlink(missing_ok=True)
    without_gpu = [] if any(map(is_hopper, listed_gpus())) else ["--test_tag_filters=-gpu"]
    try:
        run(session, bazel, "test", "//...", "--keep_going", *without_gpu, f"--build_event_json_file={events}", env=environment)
    except CommandFailed:
        if not events.exists():
            return 0, 1, 0
        built = False
    else:
        built = True
    query = [bazel, "query", r'attr(tags, "\bgpu\b", tests(//...))']
    gpu_tests = subprocess.run(query, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False).stdout
    skipped = len(gpu_tests.splitlines()) if without_gpu else 0
    summaries = [event["testSummary"] for event in map(json.loads, events.read_text().splitlines()) if "testSummary" in event]
    passed = sum(summary["overallStatus"] in ("PASSED", "FLAKY") for summary in summaries)
    failed = len(summaries) - passed
    return passed, failed if built or failed else 1, skipped


def checks_stage(session: nox.Session, commands: list[list[str]]) -> tuple[int, int, int]:
    """Each command is one check; all of them run."""
    failed = 0
    for command in commands:
        try:
            run(session, *command)
        except CommandFailed:
            failed += 1
    return len(commands) - failed, failed, 0


def lint_commands(python: str) -> list[list[str]]:
    return [[python, "-m", "ruff", "check", "."], [python, "-m", "ruff", "format", "--check", "."]]


def workflow_commands(python: str) -> list[list[str]]:
    workflows = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    return [
        [python, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows],
        [str(Path(python).with_name("zizmor")), "--offline", "--no-progress", ".github"],
    ]


def run_stages(session: nox.Session, stages: dict[str, Callable[[], tuple[int, int, int]]]) -> None:
    """Runs every stage, whatever becomes of the others; then the table, and an error where one failed."""
    (OUT / "tests").mkdir(parents=True, exist_ok=True)
    outcomes = []
    for stage, function in stages.items():
        session.log(f"stage {stage}")
        start = time.monotonic()
        try:
            passed, failed, skipped = function()
        except MissingToolError as error:
            session.warn(str(error))
            passed, failed, skipped = 0, 1, 0
        outcomes.append(Outcome(stage, passed, failed, skipped, time.monotonic() - start))
    lines = [f"{'stage':<16}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    lines += [f"{o.stage:<16}{o.passed:>8}{o.failed:>8}{o.skipped:>9}{o.seconds:>9.0f}" for o in outcomes]
    failed = sum(outcome.failed for outcome in outcomes)
    lines.append(f"{sum(outcome.passed for outcome in outcomes)} passed, {failed} failed")
    summary = "\n".join(lines) + "\n"
    print("\n" + summary, flush=True)
    (OUT / "tests" / "summary.txt").write_text(summary)
    if failed:
        session.error(f"failed: {', '.join(outcome.stage for outcome in outcomes if outcome.failed)}")


@nox.session
def tests(session: nox.Session) -> None:
    """Kernels, unit tests, `bazel test //...`, ruff and the workflow checks; with `-- ARGS`, only pytest with these arguments."""
    (OUT / "tests" / "summary.txt").unlink(missing_ok=True)
    python = interpreter(session, "dev")
    system_tool(session, "cc")  # links the kernels that the tests build
    if session.posargs:
        run_stages(session, {"pytest": lambda: pytest_stage(session, python, session.posargs, {})})
        return
    run_stages(
        session,
        {
            "kernels": lambda: kernels_stage(session, python),
            "pytest": lambda: pytest_stage(session, python, [], {"SONICMOE_KERNELS": str(OUT / "kernels")}),
            "bazel test //...": lambda: bazel_stage(session, python),
            "ruff": lambda: checks_stage(session, lint_commands(python)),
            "workflows": lambda: checks_stage(session, workflow_commands(python)),
        },
    )


@nox.session
def gpu_tests(session: nox.Session) -> None:
    """The tests marked gpu, on an sm_90 GPU, which must be there; `-- ARGS` go to pytest.

    One after the other, because some of them measure time. Names the kernels that none of them declares, which were compiled on the way.
    """
    gpus = listed_gpus()
    if not any(map(is_hopper, gpus)):
        session.error(f"gpu_tests needs an sm_90 GPU (H100, H200); this machine has {', '.join(gpus) or 'none that nvidia-smi lists'}")
    python = interpreter(session, "dev")
    system_tool(session, "cc")
    cache = OUT / "gpu_tests_cache"
    shutil.rmtree(cache, ignore_errors=True)
    arguments, environment = ["-m", "gpu", *session.posargs], {"SONICMOE_CACHE": str(cache)}
    try:
        run_stages(session, {"pytest -m gpu": lambda: pytest_stage(session, python, arguments, environment, jobs=0)})
    finally:
        compiled = sorted({path.stem for path in cache.rglob("*.so")})
        if compiled:
            session.warn(f"not prebuilt, so compiled on the way: {', '.join(compiled)}; see build_defs/gpu_kernels.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and the workflow checks."""
    python = interpreter(session, "dev")
    run_stages(
        session,
        {
            "ruff": lambda: checks_stage(session, lint_commands(python)),
            "workflows": lambda: checks_stage(session, workflow_commands(python)),
        },
    )


@nox.session
def matrix(session: nox.Session) -> None:
    """Runs the matrix on what this machine has; see `python -m testing.matrix run --help` for the arguments."""
    run_matrix(session, *session.posargs)


@nox.session
def gpu_matrix(session: nox.Session) -> None:
    """The matrix on an sm_90 GPU, which must be there."""
    gpus = listed_gpus()
    if not any(map(is_hopper, gpus)):
        session.error(f"gpu_matrix needs an sm_90 GPU (H100, H200); this machine has {', '.join(gpus) or 'none that nvidia-smi lists'}")
    run_matrix(session, "--profile", "hopper", *session.posargs)


def run_matrix(session: nox.Session, *arguments: str) -> None:
    run(session, matrix_interpreter(session), "-m", "testing.matrix", "run", *arguments)


def matrix_interpreter(session: nox.Session) -> str:
    """Beside an sm_90 GPU also with the compiler: cells take more variants of the kernels than are prebuilt, and defects new ones."""
    if not any(map(is_hopper, listed_gpus())):
        return interpreter(session, "matrix")
    system_tool(session, "cc")
    return interpreter(session, "compile,matrix")


def listed_gpus() -> list[str]:
    """ "name, compute capability" of every GPU, asked of the driver before anything is installed."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False) if shutil.which("nvidia-smi") else None
    return [] if listed is None or listed.returncode else listed.stdout.splitlines()


def is_hopper(gpu: str) -> bool:
    return gpu.endswith(" 9.0")


@nox.session
def plan(session: nox.Session) -> None:
    """Prints the matrix's shards as JSON; in a GitHub workflow also sets the step's output `shards`."""
    python = interpreter(session, "matrix")
    shards = session.run(python, "-m", "testing.matrix", "plan", *session.posargs, external=True, silent=True)
    print(shards)
    if "GITHUB_OUTPUT" in os.environ:
        with open(os.environ["GITHUB_OUTPUT"], "a") as outputs:
            outputs.write(f"shards={shards.strip()}\n")


@nox.session
def gate(session: nox.Session) -> None:
    """Merges the shards' results and decides; see `python -m testing.matrix gate --help` for the arguments."""
    run(session, interpreter(session, "matrix"), "-m", "testing.matrix", "gate", *session.posargs)


@nox.session
def gate_selftest(session: nox.Session) -> None:
    """Plants defects one at a time, each of which the gate must catch; see `python -m testing.matrix selftest --help`.

    With `-- --build DIR` only compiles the kernels with defects, on any machine, for a GPU machine that compiles nothing.
    """
    if any(word.partition("=")[0] == "--build" for word in session.posargs):
        python = interpreter(session, "compile,matrix")
        system_tool(session, "cc")
    else:
        python = matrix_interpreter(session)
    run(session, python, "-m", "testing.matrix", "selftest", *session.posargs)


@nox.session
def compile_all(session: nox.Session) -> None:
    """Builds every kernel variant for sm_90a, in parallel, no GPU needed; `-- --out DIR` says where (default: out/kernels).

    Fails where one spills, uses local memory or more registers than a block gets, or where a product does not run on wgmma.
    """
    python = interpreter(session, "dev")
    system_tool(session, "cc")
    arguments = session.posargs if "--out" in session.posargs else ["--out", OUT / "kernels", *session.posargs]
    products = (
        "routing.router_logits",
        *(f"sonicmoe.{kernel}" for kernel in ("*_projection", "activation_backward", "dx_rows", "weight_grad")),
    )
    check = ["--check", *(word for kernel in products for word in ("--wgmma", f"{kernel}-*"))]
    run(session, python, "-m", "cute_runtime", "build", "--jobs", str(os.cpu_count() or 1), *check, *arguments)


def bazel_kernels(session: nox.Session, python: str, destination: Path, target: str = "prebuilt_kernels") -> int:
    """Builds a folder of kernels with Bazel and copies them to a folder, which holds nothing else afterwards; returns how many they are."""
    bazel = find_tool(session, "bazelisk", "bazel")
    environment = bazel_environment(python)
    run(session, bazel, "build", f"//:{target}", "--keep_going", env=environment)
    info = [bazel, "info", "bazel-bin"]
    outputs = subprocess.run(info, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    partial = destination.with_name(destination.name + ".partial")
    for folder in (partial, destination):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    for kernel in Path(outputs.stdout.strip(), target).iterdir():
        shutil.copyfile(kernel, partial / kernel.name)
    partial.rename(destination)
    count = len(list(destination.iterdir()))
    session.log(f"{count} kernels in {destination.relative_to(ROOT)}")
    return count


@nox.session
def kernels(session: nox.Session) -> None:
    """Builds every kernel variant with Bazel, so that only what changed is compiled, into out/kernels.

    With ``-- --matrix`` also those that only the cells of testing/matrix.yaml need, with ``-- --tests`` besides those that only the
    tests marked gpu need, for a GPU runner that compiles nothing.
    """
    targets = {(): "prebuilt_kernels", ("--matrix",): "matrix_kernels", ("--tests",): "gpu_kernels"}
    target = targets.get(tuple(session.posargs))
    if target is None:
        session.error(f"kernels takes --matrix, --tests or nothing, not {' '.join(session.posargs)}")
    python = interpreter(session, "dev")
    system_tool(session, "cc")
    system_tool(session, "bazelisk", "bazel")
    bazel_kernels(session, python, OUT / "kernels", target)


@nox.session
def wheel(session: nox.Session) -> None:
    """Builds the kernels with Bazel and the wheel that carries them, into dist/."""
    python = interpreter(session, "dev")
    system_tool(session, "cc")
    system_tool(session, "bazelisk", "bazel")
    stage = OUT / "wheel"
    shutil.rmtree(stage, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, stage / name)
    bazel_kernels(session, python, stage / "cute_runtime" / "prebuilt")
    run(
        session,
        *(python, "-m", "build", "--wheel", "--no-isolation", "--outdir", ROOT / "dist", stage),
        f"--config-setting=--build-option=--plat-name=linux_{platform.machine()}",
        *session.posargs,
    )
    shutil.rmtree(stage)
