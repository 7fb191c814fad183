"""Writes ``<package>/kernels/variants.bzl``, the names that Bazel builds: each package's ``prebuilt_variants()``, and what the matrix's
cells, and the tests on a GPU, need beside them.

python -m build_defs.variant_lists            write the files
python -m build_defs.variant_lists --check    exit with 1 where one of them is stale
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
HEADER = '"""Written by `python -m build_defs.variant_lists`: the variants that are built ahead of time, by kernel."""'
LISTS = {"VARIANTS": "cute_runtime list", "MATRIX_VARIANTS": "testing.matrix kernels", "TEST_VARIANTS": "build_defs.gpu_kernels"}
"""Name in the file -> who lists it: what is built with the project, and what only the H100 runners need, for cells and for tests."""


def listed(root: Path, command: str) -> list[dict[str, str]]:
    """Name and kernel of every variant that one of `LISTS` lists."""
    words = [sys.executable, "-m", *command.split(), "--json"]
    return json.loads(subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout)


def variant_lists(lists: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    """The text of each file, by its path relative to the repository. Args: list's name -> its variants."""
    grouped: dict[str, dict[str, dict[str, list[str]]]] = {}
    for title, variants in lists.items():
        for variant in variants:
            folder, kernel = variant["kernel"].rsplit(".", 1)
            file = grouped.setdefault(f"{folder.replace('.', '/')}/variants.bzl", {})
            file.setdefault(title, {}).setdefault(kernel, []).append(variant["name"])
    return {path: "\n".join([HEADER, *map(_dictionary, file, file.values()), ""]) for path, file in sorted(grouped.items())}


def _dictionary(title: str, kernels: dict[str, list[str]]) -> str:
    lines = ["", f"{title} = {{"]
    for kernel, names in sorted(kernels.items()):
        lines += [f'    "{kernel}": [', *(f'        "{name}",' for name in sorted(names)), "    ],"]
    return "\n".join([*lines, "}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is stale")
    check = parser.parse_args().check
    stale = 0
    for path, text in variant_lists({title: listed(ROOT, command) for title, command in LISTS.items()}).items():
        file = ROOT / path
        if file.exists() and file.read_text() == text:
            continue
        stale += 1
        if check:
            print(f"{path}: stale; run python -m build_defs.variant_lists", file=sys.stderr)
        else:
            file.write_text(text)
            print(f"wrote {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
