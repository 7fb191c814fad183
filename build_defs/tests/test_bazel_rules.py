"""The rules of build_defs in a small workspace of their own, built by the Bazel of this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parents[2]
BAZEL = shutil.which("bazelisk") or shutil.which("bazel")

pytestmark = [
    pytest.mark.skipif(BAZEL is None, reason="no bazel or bazelisk on PATH"),
    pytest.mark.xdist_group("bazel"),  # one worker, one workspace
]

# Stands in for the compiler: what it writes differs from build to build, so an unchanged object was not built again.
COMPILER = """
import pathlib, sys, uuid
variant, out = sys.argv[sys.argv.index("--variant") + 1], sys.argv[sys.argv.index("--out") + 1]
(pathlib.Path(out) / f"{variant}.so").write_text(str(uuid.uuid4()))
"""

FILES = {
    "BUILD.bazel": """
load("//build_defs:kernels.bzl", "kernel_folder")
filegroup(name = "pytest_config", srcs = ["conftest.py", "pyproject.toml"], visibility = ["//visibility:public"])
kernel_folder(name = "prebuilt_kernels", kernels = ["//lower/kernels:prebuilt"])
""",
    "build_defs/BUILD.bazel": "",
    "cute_runtime/BUILD.bazel": """
load("//build_defs:python.bzl", "sonic_py_library")
sonic_py_library(name = "cute_runtime", srcs = glob(["*.py"]), visibility = ["//visibility:public"])
""",
    "cute_runtime/__main__.py": COMPILER,
    "lower/BUILD.bazel": """
load("//build_defs:python.bzl", "sonic_py_library")
sonic_py_library(name = "lower", srcs = ["__init__.py"], visibility = ["//visibility:public"])
""",
    "lower/__init__.py": "VALUE = 1\n",
    "lower/kernels/BUILD.bazel": """
load("//build_defs:kernels.bzl", "cute_kernels", "kernel_sources")
load("//build_defs:python.bzl", "sonic_py_library")
kernel_sources()
sonic_py_library(name = "add", srcs = ["add.py"])
sonic_py_library(name = "scale", srcs = ["scale.py"])
cute_kernels(name = "prebuilt", variants = {"add": ["lower.add-n.1", "lower.add-n.2"], "scale": ["lower.scale-n.1"]})
""",
    "lower/kernels/add.py": "",
    "lower/kernels/scale.py": "",
    "upper/BUILD.bazel": """
load("//build_defs:python.bzl", "sonic_py_library", "sonic_py_test")
sonic_py_library(name = "upper", srcs = ["__init__.py"], deps = ["//lower"])
sonic_py_test(src = "test_upper.py", deps = [":upper"])
sonic_py_test(src = "test_alone.py")
sonic_py_test(src = "test_undeclared.py", tags = ["manual"])
sonic_py_test(src = "test_kernels.py", gpu = "some", gpu_data = ["//lower/kernels:prebuilt"])
""",
    "upper/__init__.py": "import lower\nVALUE = lower.VALUE\n",
    "upper/test_upper.py": "import upper\ndef test_value():\n    assert upper.VALUE == 1\n",
    "upper/test_alone.py": "def test_nothing():\n    assert True\n",
    "upper/test_undeclared.py": "import lower\ndef test_value():\n    assert lower.VALUE == 1\n",
    "upper/test_kernels.py": """
import pathlib
import pytest
def test_kernels_are_no_input_of_cpu_tests():
    assert not list(pathlib.Path("lower").glob("kernels/prebuilt/*"))
@pytest.mark.gpu
def test_kernels_lie_beside_their_module():
    assert len(list(pathlib.Path("lower").glob("kernels/prebuilt/*"))) == 3
""",
}


class Workspace:
    """A copy of the rules with two packages, and its own Bazel server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "workspace"
        for name in ("WORKSPACE", "MODULE.bazel", ".bazelrc", ".bazelignore", "pyproject.toml", "conftest.py"):
            self.write(name, (ROOT / name).read_text())
        for file in [*(ROOT / "build_defs").glob("*.bzl"), *(ROOT / "third_party").rglob("*")]:
            if file.is_file():
                self.write(str(file.relative_to(ROOT)), file.read_text())
        for name, text in FILES.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def bazel(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [BAZEL, f"--output_base={self.root / 'base'}", "--max_idle_secs=20", *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, check=False)

    def tests_run(self, *targets: str) -> dict[str, str]:
        """Runs the tests; what became of each: PASSED, FAILED, or (cached) PASSED."""
        lines = self.bazel("test", *targets).stdout.splitlines()
        return {line.split()[0]: line.split("  ", 1)[1].strip().split(" in ")[0] for line in lines if line.startswith("//")}

    def kernels(self) -> dict[str, str]:
        """Builds all kernels; the text of each."""
        result = self.bazel("build", "//:prebuilt_kernels")
        assert result.returncode == 0, result.stderr
        return {path.name: path.read_text() for path in (self.path / "bazel-bin" / "prebuilt_kernels").iterdir()}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path_factory.mktemp("bazel"))
    yield workspace
    workspace.bazel("shutdown")


def test_touching_a_file_reruns_only_what_depends_on_it(workspace: Workspace):
    first = workspace.tests_run("//upper:test_upper", "//upper:test_alone")
    assert first == {"//upper:test_upper": "PASSED", "//upper:test_alone": "PASSED"}
    workspace.write("lower/__init__.py", "VALUE = 2\n")
    second = workspace.tests_run("//upper:test_upper", "//upper:test_alone")
    assert second == {"//upper:test_upper": "FAILED", "//upper:test_alone": "(cached) PASSED"}


def test_undeclared_import_fails(workspace: Workspace):
    assert workspace.tests_run("//upper:test_undeclared") == {"//upper:test_undeclared": "FAILED"}


def test_touching_a_kernel_builds_only_its_variants(workspace: Workspace):
    first = workspace.kernels()
    assert first.keys() == {"lower.add-n.1.so", "lower.add-n.2.so", "lower.scale-n.1.so"}
    workspace.write("lower/kernels/add.py", "# changed\n")
    second = workspace.kernels()
    assert {name for name in first if first[name] != second[name]} == {"lower.add-n.1.so", "lower.add-n.2.so"}


def test_gpu_target_gets_the_kernels_with_their_sources_and_skips_without_a_gpu(workspace: Workspace):
    targets = ["//upper:test_kernels", "//upper:test_kernels_gpu"]
    assert workspace.tests_run(*targets) == dict.fromkeys(targets, "PASSED")
    log = (workspace.path / "bazel-testlogs/upper/test_kernels_gpu/test.log").read_text()
    assert "1 skipped" in log
    runfiles = workspace.path / "bazel-bin/upper/test_kernels_gpu.sh.runfiles"
    assert len(list(runfiles.glob("*/lower/kernels/prebuilt/*.so"))) == 3
    assert {path.name for path in runfiles.glob("*/lower/kernels/*.py")} == {"add.py", "scale.py"}
