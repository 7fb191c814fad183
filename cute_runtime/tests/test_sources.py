"""The key of a compiled kernel changes with everything that could change the kernel, and with nothing else."""

import gc
import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cute_runtime import Variant
from cute_runtime import sources as module
from cute_runtime.sources import changed_sources, key, sources


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package whose kernel imports one module of its own, one of a neighbour's, and the standard library."""
    files = {
        "toy/__init__.py": "raise RuntimeError('a package of kernels is not imported')",
        "toy/kernels/__init__.py": "",
        "toy/kernels/gemm.py": "import math\nfrom toy.kernels import tiles\nfrom dispatch import absent\n",
        "toy/kernels/tiles.py": "from . import shapes\n",
        "toy/kernels/shapes.py": "M = 128\n",
        "toy/kernels/other.py": "",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    module.package_folder.cache_clear()
    yield tmp_path / "toy" / "kernels"
    module.package_folder.cache_clear()


VARIANT = Variant("toy.kernels.gemm", {"tile": 128})


def test_sources_are_the_modules_reached_by_imports_and_the_compile_step(toy):
    assert list(sources(VARIANT)) == [
        "cute_runtime/compile_worker.py",
        "cute_runtime/shim.c",
        "toy/kernels/gemm.py",
        "toy/kernels/shapes.py",
        "toy/kernels/tiles.py",
    ]


@pytest.mark.parametrize("name", ["gemm.py", "tiles.py", "shapes.py"])
def test_key_changes_with_every_source(toy, name):
    before = sources(VARIANT)
    (toy / name).write_text((toy / name).read_text() + "\nX = 1\n")
    after = sources(VARIANT)
    assert key(VARIANT, after, "1.0") != key(VARIANT, before, "1.0")
    assert changed_sources(before) == [f"toy/kernels/{name}"]


def test_key_ignores_modules_that_the_kernel_does_not_import(toy):
    before = sources(VARIANT)
    (toy / "other.py").write_text("X = 1\n")
    (toy.parent / "__init__.py").write_text("X = 1\n")
    assert sources(VARIANT) == before
    assert changed_sources(before) == []


def test_key_changes_with_parameters_compiler_and_target(toy, monkeypatch):
    digests = sources(VARIANT)
    keys = {
        key(VARIANT, digests, "1.0"),
        key(VARIANT, digests, "1.1"),
        key(Variant("toy.kernels.gemm", {"tile": 256}), digests, "1.0"),
    }
    monkeypatch.setattr(module, "ARCH", "sm_100a")
    keys.add(key(VARIANT, digests, "1.0"))
    assert len(keys) == 4


def test_nothing_is_stale_where_the_sources_are_not_installed():
    assert changed_sources({"nowhere/kernels/gemm.py": "0"}) == []


def test_missing_kernel_is_named():
    with pytest.raises(ValueError, match=r"kernel='toy.kernels.missing': there is no module toy/kernels/missing.py on the import path"):
        sources(Variant("toy.kernels.missing"))


def test_finding_sources_imports_nothing(toy):
    sources(VARIANT)
    assert "toy" not in sys.modules
    assert importlib.util.find_spec("toy") is not None


@pytest.fixture
def frequent_yields():
    """Collections of garbage that let another thread run, also in the middle of a parse."""

    def give_way(phase, info):
        time.sleep(1e-5)

    threshold = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(give_way)
    yield
    gc.callbacks.remove(give_way)
    gc.set_threshold(*threshold)


def test_sources_are_parsed_by_several_threads_at_once(frequent_yields):
    # Without the lock Python 3.11's parser raises SystemError within a few of these.
    content = Path(module.__file__).read_bytes()
    expected = module._imports("cute_runtime/sources.py", content)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(module._imports, ["cute_runtime/sources.py"] * 40, [content] * 40)) == [expected] * 40
