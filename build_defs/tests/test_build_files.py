from pathlib import Path

import pytest

from build_defs import build_files

ROOT = Path(__file__).absolute().parents[2]

LIBRARY = 'sonic_py_library(name = "dispatch", srcs = glob(["*.py"]), deps = [{deps}])\n'


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two packages, the upper importing the lower lazily, and a test: all as it should be."""
    write_tree(
        tmp_path,
        {
            "cute_runtime/BUILD.bazel": 'sonic_py_library(name = "cute_runtime", srcs = ["__init__.py"])\n',
            "cute_runtime/__init__.py": "",
            "dispatch/BUILD.bazel": LIBRARY.format(deps='"//cute_runtime"'),
            "dispatch/__init__.py": "from .types import Plan\n",
            "dispatch/types.py": "def plan():\n    import cute_runtime\n",
            "dispatch/tests/BUILD.bazel": 'sonic_py_test(src = "test_plan.py", deps = ["//dispatch"])\n',
            "dispatch/tests/test_plan.py": "from dispatch import types\n",
        },
    )
    return tmp_path


def test_repository_declares_exactly_what_it_imports():
    assert build_files.problems(ROOT) == []


def test_bazel_hands_every_package_to_this_test():
    """One left out of `data` would go unchecked under Bazel; pytest sees the whole checkout."""
    build_files_below = [path for top in (*build_files.FLOORS, "build_defs") for path in (ROOT / top).rglob("BUILD.bazel")]
    checked = {
        f"//{path.parent.relative_to(ROOT).as_posix()}:checked_files" for path in build_files_below if "checked_files()" in path.read_text()
    }
    data = (ROOT / "build_defs" / "tests" / "BUILD.bazel").read_text()
    assert [label for label in sorted(checked) if label != "//build_defs/tests:checked_files" and f'"{label}"' not in data] == []


def test_tree_in_order_has_no_problems(tree: Path):
    assert build_files.problems(tree) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"dispatch/BUILD.bazel": LIBRARY.format(deps="")},
            "//dispatch:dispatch: deps lack //cute_runtime:cute_runtime (dispatch/types.py imports cute_runtime)",
        ),
        (
            {"dispatch/types.py": ""},
            "//dispatch:dispatch: deps name //cute_runtime:cute_runtime, which nothing imports",
        ),
        (
            {"cute_runtime/__init__.py": "from dispatch.types import Plan\n"},
            "cute_runtime/__init__.py: imports dispatch.types, but imports run testing -> sonicmoe -> routing -> dispatch -> cute_runtime",
        ),
        ({"dispatch/tests/test_new.py": ""}, "dispatch/tests/test_new.py: belongs to no target"),
        (
            {"dispatch/tests/test_plan.py": "import pytest\nfrom dispatch import types\n@pytest.mark.gpu\ndef test_x(): ...\n"},
            "//dispatch/tests:test_plan: gpu = 'none', but of the tests in dispatch/tests/test_plan.py some are marked gpu",
        ),
        (
            {"cute_runtime/BUILD.bazel": 'sonic_py_library(name = "cute_runtime", srcs = ["__init__.py", "gone.py"])\n'},
            "//cute_runtime:cute_runtime: names cute_runtime/gone.py, which does not exist",
        ),
    ],
    ids=["missing_dep", "superfluous_dep", "upward_import", "orphan_file", "undeclared_gpu_test", "missing_file"],
)
def test_breach_is_reported_with_target_and_cause(tree: Path, files: dict[str, str], expected: str):
    write_tree(tree, files)
    assert expected in build_files.problems(tree)


def test_file_in_two_targets_is_reported(tree: Path):
    with (tree / "dispatch/BUILD.bazel").open("a") as build:
        build.write('sonic_py_library(name = "types", srcs = ["types.py"], deps = ["//cute_runtime"])\n')
    assert "dispatch/types.py: belongs to 2 targets, //dispatch:dispatch and //dispatch:types" in build_files.problems(tree)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pytest\npytestmark = pytest.mark.gpu\ndef test_x(): ...\n", "all"),
        ("import pytest\npytestmark = [pytest.mark.gpu]\ndef test_x(): ...\n", "all"),
        ("import pytest\n@pytest.mark.gpu\ndef test_x(): ...\n", "some"),
        ("def test_x(): ...\n", "none"),
    ],
)
def test_gpu_marks_are_found(source: str, expected: str):
    assert build_files.gpu_tests(source) == expected
