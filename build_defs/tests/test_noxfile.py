"""What the nox sessions make of tools that are missing, of commands that fail, and of tests that cannot run here."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from nox.command import CommandFailed

ROOT = Path(__file__).absolute().parents[2]
PYTEST_REPORT = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>'
BAZEL = """#!/bin/sh
echo "$@" >> {log}
case $1 in
query) echo //routing/tests:test_top_k_gpu; echo //dispatch/tests:test_plan_gpu;;
test) for option; do case $option in --build_event_json_file=*) cp {events} "${{option#*=}}";; esac; done; exit {status};;
esac
"""


@functools.cache
def load() -> ModuleType:
    """Once: nox keeps a list of all sessions that were ever defined."""
    spec = importlib.util.spec_from_file_location("noxfile_under_test", ROOT / "noxfile.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def noxfile(tmp_path, monkeypatch):
    """The module, with its outputs in a folder of the test's own."""
    module = load()
    monkeypatch.setattr(module, "OUT", tmp_path)
    (tmp_path / "tests").mkdir()
    return module


class Session:
    """As much of nox.Session as the stages use."""

    def __init__(self, *, sandboxed: bool = True) -> None:
        self.virtualenv = SimpleNamespace(is_sandboxed=sandboxed)
        self.warnings: list[str] = []
        self.log = lambda message: None
        self.warn = self.warnings.append

    def error(self, message: str) -> None:
        raise SystemExit(message)

    def run(self, *command: str, env: dict[str, str] | None = None, external: bool) -> None:
        if subprocess.run(command, check=False).returncode:
            raise CommandFailed


def test_every_stage_runs_though_a_tool_is_missing(noxfile, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no bazel, no apt-get
    session = Session()
    stages = {"bazel": lambda: noxfile.bazel_stage(session, "python"), "last": lambda: (2, 0, 5)}
    with pytest.raises(SystemExit, match=r"^failed: bazel$"):
        noxfile.run_stages(session, stages)
    (warning,) = session.warnings
    assert warning == "no bazelisk or bazel on PATH and no apt-get to install bazel-bootstrap with: install it, then run this again"
    lines = (tmp_path / "tests" / "summary.txt").read_text().splitlines()
    assert [line.split()[:4] for line in lines[1:3]] == [["bazel", "0", "1", "0"], ["last", "2", "0", "5"]]
    assert lines[-1] == "2 passed, 1 failed"


def test_without_an_environment_nothing_is_installed(noxfile, monkeypatch, tmp_path):
    for name, status in (("apt-get", 1), ("sudo", 1), ("cc", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert noxfile.system_tool(Session(sandboxed=False), "cc") == str(tmp_path / "cc")
    message = "no bazelisk or bazel on PATH, and --no-venv installs nothing: install bazel-bootstrap, then run this again"
    with pytest.raises(SystemExit, match=f"^{message}$"):
        noxfile.system_tool(Session(sandboxed=False), "bazelisk", "bazel")
    with pytest.raises(SystemExit, match=r"^apt-get could not install bazel-bootstrap; install bazelisk or bazel by hand"):
        noxfile.system_tool(Session(), "bazelisk", "bazel")


@pytest.mark.parametrize(("fails", "expected"), [(False, (2, 0, 1)), (True, (2, 1, 1))])
def test_pytest_that_fails_without_a_failed_test_has_failed(noxfile, monkeypatch, fails, expected):
    def run(session, *command, env):
        (noxfile.OUT / "tests" / "pytest.xml").write_text(PYTEST_REPORT)
        if fails:
            raise CommandFailed

    monkeypatch.setattr(noxfile, "run", run)
    assert noxfile.pytest_stage(Session(), "python", [], {}) == expected


@pytest.mark.parametrize(
    ("gpus", "status", "outcomes", "expected"),
    [
        ([], 0, ["PASSED", "FLAKY"], (2, 0, 2)),
        (["NVIDIA A100, 8.0"], 3, ["PASSED", "FAILED", "TIMEOUT"], (1, 2, 2)),
        (["NVIDIA H100 80GB HBM3, 9.0"], 0, ["PASSED"], (1, 0, 0)),
        ([], 1, [], (0, 1, 2)),  # the build failed
    ],
)
def test_bazels_gpu_tests_are_skipped_and_not_passed_without_one(noxfile, monkeypatch, tmp_path, gpus, status, outcomes, expected):
    events, log, bazel = tmp_path / "events", tmp_path / "log", tmp_path / "bazel"
    events.write_text("".join(f'{{"testSummary": {{"overallStatus": "{outcome}"}}}}\n' for outcome in outcomes) + '{"started": {}}\n')
    bazel.write_text(BAZEL.format(log=log, events=events, status=status))
    bazel.chmod(0o755)
    monkeypatch.setattr(noxfile, "find_tool", lambda session, *names: str(bazel))
    monkeypatch.setattr(noxfile, "bazel_environment", lambda python: {})
    monkeypatch.setattr(noxfile, "listed_gpus", lambda: gpus)
    assert noxfile.bazel_stage(Session(), "python") == expected
    assert ("--test_tag_filters=-gpu" in log.read_text().splitlines()[0]) == (expected[2] > 0)


def test_kernels_are_copied_to_where_pytest_looks(noxfile, monkeypatch, tmp_path):
    built, bazel = tmp_path / "bin" / "prebuilt_kernels", tmp_path / "bazel"
    built.mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "old.so").touch()
    bazel.write_text(f"#!/bin/sh\ncase $1 in info) echo {tmp_path}/bin;; build) test -e {tmp_path}/broken && exit 1; exit 0;; esac\n")
    bazel.chmod(0o755)
    for name in ("a.so", "b.so"):
        (built / name).write_text(name)
    monkeypatch.setattr(noxfile, "find_tool", lambda session, *names: str(bazel))
    monkeypatch.setattr(noxfile, "bazel_environment", lambda python: {})
    monkeypatch.setattr(noxfile, "ROOT", tmp_path)
    assert noxfile.kernels_stage(Session(), "python") == (2, 0, 0)
    assert {path.name: path.read_text() for path in (tmp_path / "kernels").iterdir()} == {"a.so": "a.so", "b.so": "b.so"}
    (tmp_path / "broken").touch()
    assert noxfile.kernels_stage(Session(), "python") == (0, 1, 0)


def test_gpu_is_asked_of_the_driver(noxfile, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert noxfile.listed_gpus() == []
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\necho 'NVIDIA A100-SXM4-40GB, 8.0'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert [noxfile.is_hopper(gpu) for gpu in noxfile.listed_gpus()] == [True, False]


def test_gpu_tests_without_an_sm_90_gpu_are_an_error_and_not_a_success(noxfile, monkeypatch):
    monkeypatch.setattr(noxfile, "listed_gpus", lambda: ["NVIDIA A100, 8.0"])
    with pytest.raises(SystemExit, match=r"^gpu_tests needs an sm_90 GPU \(H100, H200\); this machine has NVIDIA A100, 8.0$"):
        noxfile.gpu_tests(Session())


def test_gpu_tests_run_one_by_one_and_name_what_was_compiled_on_the_way(noxfile, monkeypatch, tmp_path):
    called = []

    def run(session, *command, env):
        called.append([str(word) for word in command])
        (tmp_path / "tests" / "pytest.xml").write_text(PYTEST_REPORT)
        (Path(env["SONICMOE_CACHE"]) / "key").mkdir(parents=True)
        (Path(env["SONICMOE_CACHE"]) / "key" / "sonicmoe.new-tile.m8.so").touch()

    monkeypatch.setattr(noxfile, "run", run)
    monkeypatch.setattr(noxfile, "listed_gpus", lambda: ["NVIDIA H100 80GB HBM3, 9.0"])
    monkeypatch.setattr(noxfile, "interpreter", lambda session, extra: "python")
    monkeypatch.setattr(noxfile, "system_tool", lambda session, *names: "cc")
    session = Session()
    session.posargs = ["dispatch"]
    noxfile.gpu_tests(session)
    (command,) = called
    assert command[-3:] == ["-m", "gpu", "dispatch"]
    assert command[command.index("-n") + 1] == "0"
    assert session.warnings == ["not prebuilt, so compiled on the way: sonicmoe.new-tile.m8; see build_defs/gpu_kernels.py"]


@pytest.mark.parametrize(("words", "target"), [([], "prebuilt_kernels"), (["--matrix"], "matrix_kernels"), (["--tests"], "gpu_kernels")])
def test_kernels_builds_the_folder_that_is_asked_for(noxfile, monkeypatch, words, target):
    built = []
    monkeypatch.setattr(noxfile, "interpreter", lambda session, extra: "python")
    monkeypatch.setattr(noxfile, "system_tool", lambda session, *names: names[0])
    monkeypatch.setattr(noxfile, "bazel_kernels", lambda session, python, destination, target: built.append(target))
    session = Session()
    session.posargs = words
    noxfile.kernels(session)
    assert built == [target]
    session.posargs = ["--all"]
    with pytest.raises(SystemExit, match=r"^kernels takes --matrix, --tests or nothing, not --all$"):
        noxfile.kernels(session)


@pytest.mark.parametrize(
    ("words", "extra"), [(["--build", "out/defects"], "compile,matrix"), (["--build=out/defects"], "compile,matrix"), ([], "matrix")]
)
def test_defects_are_built_with_the_compiler_on_a_machine_without_a_gpu(noxfile, monkeypatch, words, extra):
    called = []
    monkeypatch.setattr(noxfile, "listed_gpus", lambda: [])
    monkeypatch.setattr(noxfile, "system_tool", lambda session, *names: names[0])
    monkeypatch.setattr(noxfile, "interpreter", lambda session, extra: extra)
    monkeypatch.setattr(noxfile, "run", lambda session, *command: called.append(command))
    session = Session()
    session.posargs = words
    noxfile.gate_selftest(session)
    assert called == [(extra, "-m", "testing.matrix", "selftest", *words)]
