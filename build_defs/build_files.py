"""Compares the BUILD.bazel files with the imports of the Python files they name.

A BUILD file is read by executing it (its syntax is a subset of Python's) with recording stand-ins for the rules. The
rules of the house, each reported with the target or file that breaks it:

- every Python file of a package belongs to exactly one target;
- a target's ``deps`` are exactly the libraries that its files import, lazy imports included;
- imports run one way: testing -> sonicmoe -> routing -> dispatch -> cute_runtime;
- a test target says which of its file's tests are marked gpu: none, some or all.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOORS = ("cute_runtime", "dispatch", "routing", "sonicmoe", "testing")
"""Packages from the ground up: each imports only those before it."""


@dataclass(frozen=True)
class Target:
    """One Python library or test of a BUILD file. Files are paths relative to the repository."""

    label: str
    files: tuple[str, ...]
    deps: frozenset[str] = field(default_factory=frozenset)
    is_test: bool = False
    gpu: str = "none"


def absolute_label(label: str, package: str) -> str:
    """The one spelling of a label used here: ``//package:name``; ``:x`` and ``//a/x`` are completed."""
    if label.startswith(":"):
        return f"//{package}{label}"
    if ":" not in label:
        return f"{label}:{label.rsplit('/', 1)[-1]}"
    return label


def read_build_file(path: Path, root: Path) -> list[Target]:
    """The Python targets of one BUILD file."""
    package = path.parent.relative_to(root).as_posix()
    targets: list[Target] = []

    def glob(include: Iterable[str], exclude: Iterable[str] = (), **_: object) -> list[str]:
        found = {match for pattern in include for match in path.parent.glob(pattern) if match.is_file()}
        found -= {match for pattern in exclude for match in path.parent.glob(pattern)}
        return sorted(match.relative_to(path.parent).as_posix() for match in found)

    def add(name: str, srcs: Iterable[str], deps: Iterable[str], **more: Any) -> None:
        files = tuple(f"{package}/{src}" for src in srcs)
        targets.append(Target(f"//{package}:{name}", files, frozenset(absolute_label(dep, package) for dep in deps), **more))

    def sonic_py_library(name: str, srcs: list[str], deps: Iterable[str] = (), **_: object) -> None:
        add(name, srcs, deps)

    def sonic_py_test(src: str, deps: Iterable[str] = (), gpu: str = "none", **_: object) -> None:
        add(src.removesuffix(".py"), [src], deps, is_test=True, gpu=gpu)

    def ignored(*_: object, **__: object) -> None:
        """Rules that hold no Python sources."""

    rules: dict[str, Callable[..., object]] = {"glob": glob, "sonic_py_library": sonic_py_library, "sonic_py_test": sonic_py_test}

    def load(_: str, *names: str) -> None:
        for name in names:
            rules.setdefault(name, ignored)

    rules |= dict.fromkeys(("checked_files", "cute_kernels", "exports_files", "filegroup", "package", "test_suite"), ignored)
    rules["load"] = load
    exec(compile(path.read_text(), str(path), "exec"), rules)
    return targets


def read_targets(root: Path) -> list[Target]:
    """All Python targets of the packages and of build_defs."""
    paths = [path for floor in (*FLOORS, "build_defs") for path in sorted((root / floor).rglob("BUILD.bazel"))]
    return [target for path in paths for target in read_build_file(path, root)]


def module_name(file: str) -> str:
    """``dispatch/types.py`` is ``dispatch.types``, ``dispatch/__init__.py`` is ``dispatch``."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_modules(source: str, file: str, known: Iterable[str]) -> Iterator[str]:
    """The modules among ``known`` that a file names in its import statements, at any depth."""
    known = set(known)
    package = module_name(file).split(".") if file.endswith("/__init__.py") else module_name(file).split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                name = submodule if submodule in known else module
                if name in known:
                    yield name


def gpu_tests(source: str) -> str:
    """Which tests of a file are marked gpu: "all" where its ``pytestmark`` says so, "some" where the mark occurs elsewhere, or "none"."""
    tree = ast.parse(source)
    marks = [node for statement in tree.body if is_pytestmark(statement) for node in ast.walk(statement)]
    return "all" if any(map(is_gpu_mark, marks)) else "some" if any(map(is_gpu_mark, ast.walk(tree))) else "none"


def is_pytestmark(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and any(isinstance(name, ast.Name) and name.id == "pytestmark" for name in statement.targets)


def is_gpu_mark(node: ast.AST) -> bool:
    """Whether the node is ``pytest.mark.gpu``."""
    return isinstance(node, ast.Attribute) and node.attr == "gpu" and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"


def python_files(root: Path) -> list[str]:
    """Every Python file below the packages and build_defs."""
    return sorted(path.relative_to(root).as_posix() for floor in (*FLOORS, "build_defs") for path in (root / floor).rglob("*.py"))


def problems(root: Path) -> list[str]:
    """One sentence for each breach of the rules above; empty where all is well."""
    targets = read_targets(root)
    found = []
    owners: dict[str, list[str]] = {}
    for target in targets:
        for file in target.files:
            owners.setdefault(file, []).append(target.label)
    files = python_files(root)
    found += [f"{file}: belongs to no target" for file in files if file not in owners]
    found += [f"{file}: belongs to {len(labels)} targets, {' and '.join(labels)}" for file, labels in owners.items() if len(labels) > 1]
    module_owner = {module_name(file): labels[0] for file, labels in owners.items()}
    for target in targets:
        found += target_problems(target, root, module_owner)
    return found


def target_problems(target: Target, root: Path, module_owner: dict[str, str]) -> Iterator[str]:
    """The breaches of one target."""
    wanted: dict[str, str] = {}
    for file in target.files:
        if not (root / file).is_file():
            yield f"{target.label}: names {file}, which does not exist"
            continue
        source = (root / file).read_text()
        floor = file.split("/", 1)[0]
        for module in imported_modules(source, file, module_owner):
            wanted.setdefault(module_owner[module], f"{file} imports {module}")
            if floor in FLOORS and module.split(".")[0] not in FLOORS[: FLOORS.index(floor) + 1]:
                yield f"{file}: imports {module}, but imports run {' -> '.join(reversed(FLOORS))}"
        if target.is_test and gpu_tests(source) != target.gpu:
            yield f"{target.label}: gpu = {target.gpu!r}, but of the tests in {file} {gpu_tests(source)} are marked gpu"
    wanted.pop(target.label, None)
    yield from (f"{target.label}: deps lack {label} ({why})" for label, why in sorted(wanted.items()) if label not in target.deps)
    yield from (f"{target.label}: deps name {label}, which nothing imports" for label in sorted(target.deps - wanted.keys()))
