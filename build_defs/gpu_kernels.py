"""Which kernels the tests marked gpu load, beside the prebuilt ones and the matrix's: a GPU runner then compiles nothing.

python -m build_defs.gpu_kernels [--json]

A test file with such tests says so itself, from the parameters of its tests: its function ``gpu_kernels()`` returns variants. One without
the function takes prebuilt kernels only.
"""

import argparse
import importlib
import json
from pathlib import Path

from cute_runtime import Variant, prebuilt_variants
from testing.matrix.cells import load_matrix
from testing.matrix.kernels import matrix_variants

ROOT = Path(__file__).absolute().parents[1]


def declaring(root: Path = ROOT) -> list[str]:
    """The modules of the test files that declare kernels.

    Raises:
        ValueError: one of them has no test marked gpu.
    """
    modules = []
    for path in sorted(root.glob("*/tests/test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "\ndef gpu_kernels(" in text:
            if "pytest.mark.gpu" not in text:
                raise ValueError(f"{path.relative_to(root)}: declares gpu_kernels and has no test marked gpu")
            modules.append(".".join(path.relative_to(root).with_suffix("").parts))
    return modules


def test_variants() -> list[Variant]:
    """What the tests need of what is neither prebuilt nor built for the matrix, sorted by name."""
    needed = {variant for module in declaring() for variant in importlib.import_module(module).gpu_kernels()}
    return sorted(needed - {*prebuilt_variants()} - {*matrix_variants(load_matrix())}, key=lambda variant: variant.name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m build_defs.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="name and kernel of each as JSON")
    variants = test_variants()
    if parser.parse_args().json:
        print(json.dumps([{"name": variant.name, "kernel": variant.kernel} for variant in variants]))
    else:
        print("\n".join(variant.name for variant in variants))


if __name__ == "__main__":
    main()
