"""Writes ``<package>/kernels/variants.bzl``, the names that Bazel builds, from each package's ``prebuilt_variants()``.

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


def prebuilt_variants(root: Path) -> list[dict[str, str]]:
    """What cute_runtime lists: name and kernel of every variant that is built ahead of time."""
    command = [sys.executable, "-m", "cute_runtime", "list", "--json"]
    return json.loads(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


def variant_lists(variants: list[dict[str, str]]) -> dict[str, str]:
    """The text of each file, by its path relative to the repository."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for variant in variants:
        folder, kernel = variant["kernel"].rsplit(".", 1)
        grouped.setdefault(f"{folder.replace('.', '/')}/variants.bzl", {}).setdefault(kernel, []).append(variant["name"])
    texts = {}
    for path, kernels in sorted(grouped.items()):
        lines = [HEADER, "", "VARIANTS = {"]
        for kernel, names in sorted(kernels.items()):
            lines += [f'    "{kernel}": [', *(f'        "{name}",' for name in sorted(names)), "    ],"]
        texts[path] = "\n".join([*lines, "}", ""])
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is stale")
    check = parser.parse_args().check
    stale = 0
    for path, text in variant_lists(prebuilt_variants(ROOT)).items():
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
