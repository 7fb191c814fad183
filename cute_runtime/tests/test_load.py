"""Where a kernel comes from: prebuilt, then the cache, then the compiler, and what is said when none can serve."""

import logging
import subprocess
import sys
import threading
import time

import pytest

from cute_runtime import MissingKernelError, Variant, builder, cache, load, prepare
from cute_runtime import sources as sources_module
from cute_runtime.discover import prebuilt_folders
from cute_runtime.objects import object_name, split_object, write_object
from cute_runtime.sources import compiler_version, key, sources

finder = sys.modules["cute_runtime.load"]


@pytest.fixture
def variant(tmp_path, monkeypatch):
    """A kernel in a package of its own, with empty prebuilt folders, its own cache, and a compiler that only writes a file."""
    kernels = tmp_path / "src" / "toy" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "gemm.py").write_text("M = 128\n")
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.setenv("SONICMOE_KERNELS", str(tmp_path / "prebuilt"))
    monkeypatch.setenv("SONICMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prebuilt").mkdir()
    monkeypatch.setattr(finder, "compiler_version", lambda: "1.0")
    monkeypatch.setattr(cache, "compiler_version", lambda: "1.0")
    monkeypatch.setattr(finder, "_loaded", {})
    sources_module.package_folder.cache_clear()
    yield Variant("toy.kernels.gemm", {"tile": 128})
    sources_module.package_folder.cache_clear()


def put(folder, variant, content=b"object", **changes):
    digests = sources(variant)
    facts = {"variant": variant, "key": key(variant, digests, "1.0"), "compiler": "c 1.0", "arch": "sm_90a", "sources": digests}
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / object_name(variant), content, **facts | changes)
    return folder / object_name(variant)


@pytest.fixture
def builds(monkeypatch):
    """The folders that the stand-in for the compiler was asked to build in."""
    calls = []

    def build(variant, folder):
        calls.append(folder)
        time.sleep(0.05)
        return put(folder, variant, b"built")

    monkeypatch.setattr(builder, "build", build)
    return calls


def test_folders_are_the_environments_then_beside_the_kernel_then_the_wheels(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("SONICMOE_KERNELS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    first, second, beside, wheel = prebuilt_folders(variant.kernel)
    assert (first, second, beside) == (tmp_path / "a", tmp_path / "b", tmp_path / "src" / "toy" / "kernels" / "prebuilt")
    assert wheel.parts[-2:] == ("cute_runtime", "prebuilt")


def test_prebuilt_object_is_taken_without_a_compiler(variant, tmp_path, monkeypatch, builds):
    path = put(tmp_path / "prebuilt", variant)
    monkeypatch.setattr(finder, "compiler_version", lambda: None)
    assert finder.find(variant) == path
    assert builds == []


def test_object_beside_the_kernel_is_found(variant, tmp_path, builds):
    path = put(tmp_path / "src" / "toy" / "kernels" / "prebuilt", variant)
    assert finder.find(variant) == path


def test_stale_prebuilt_object_is_passed_over_and_named(variant, tmp_path, builds, caplog):
    put(tmp_path / "prebuilt", variant)
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").write_text("M = 256\n")
    path = finder.find(variant)
    assert len(builds) == 1
    assert tmp_path / "cache" in path.parents
    assert "is stale, toy/kernels/gemm.py changed since it was built; it is not used" in caplog.text


def test_stale_object_is_named_once_and_not_where_another_fits(variant, tmp_path, builds, caplog, monkeypatch):
    stale = put(tmp_path / "prebuilt", variant)
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").write_text("M = 256\n")
    built = finder.find(variant)
    assert finder.find(variant) == built
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == [str(stale)]
    caplog.clear()
    fitting = put(tmp_path / "other", variant)
    monkeypatch.setenv("SONICMOE_KERNELS", f"{tmp_path / 'prebuilt'}:{tmp_path / 'other'}")
    assert finder.find(variant) == fitting
    assert caplog.records == []


def test_stale_object_is_named_where_nothing_can_be_compiled(variant, tmp_path, caplog, monkeypatch):
    put(tmp_path / "prebuilt", variant)
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").write_text("M = 256\n")
    monkeypatch.setattr(finder, "compiler_version", lambda: None)
    with pytest.raises(MissingKernelError):
        finder.find(variant)
    assert "is stale, toy/kernels/gemm.py changed since it was built; it is not used" in caplog.text


def test_prebuilt_object_without_its_sources_is_taken(variant, tmp_path, builds):
    path = put(tmp_path / "prebuilt", variant)
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").unlink()
    assert finder.find(variant) == path


def test_damaged_prebuilt_object_is_passed_over_and_named(variant, tmp_path, builds, caplog):
    path = put(tmp_path / "prebuilt", variant)
    path.write_bytes(path.read_bytes()[:-1])
    assert finder.find(variant) != path
    assert "cut short" in caplog.text


def test_object_of_another_variant_under_this_name_is_passed_over(variant, tmp_path, builds, caplog):
    path = put(tmp_path / "prebuilt", variant)
    put(tmp_path / "other", Variant("toy.kernels.gemm", {"tile": 64})).rename(path)
    assert finder.find(variant) != path
    assert "holds toy.gemm-tile.64" in caplog.text


def test_second_use_comes_from_the_cache(variant, builds):
    assert finder.find(variant) == finder.find(variant)
    assert len(builds) == 1


def test_cache_misses_after_a_change_of_source_or_compiler(variant, tmp_path, builds, monkeypatch):
    finder.find(variant)
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").write_text("M = 256\n")
    finder.find(variant)
    monkeypatch.setattr(cache, "compiler_version", lambda: "1.1")
    finder.find(variant)
    assert len(builds) == 3


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"", lambda content: b"X" + content[1:]])
def test_corrupt_cache_entry_is_a_miss_and_says_so(variant, builds, caplog, damage):
    path = finder.find(variant)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert finder.find(variant) == path
    assert len(builds) == 2
    assert split_object(path)[1] == b"built"
    assert "it is compiled anew" in caplog.text


def test_concurrent_first_users_compile_once(variant, builds):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.cached_or_built(variant))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("SONICMOE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "sonicmoe" / "kernels"


def test_unwritable_cache_is_refused_by_name(variant, tmp_path, monkeypatch, builds):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SONICMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"SONICMOE_CACHE='.*file.*': cannot be made a folder \(Not a directory\)"):
        finder.find(variant)


def test_without_object_and_compiler_the_error_says_what_to_do(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(finder, "compiler_version", lambda: None)
    with pytest.raises(MissingKernelError) as caught:
        finder.find(variant)
    message = str(caught.value)
    for part in (
        variant.name,
        str(tmp_path / "prebuilt"),
        'pip install "sonicmoe[compile]"',
        "python -m cute_runtime build",
        "SONICMOE_KERNELS",
    ):
        assert part in message
    assert "\n" not in message


def test_compiler_version_is_none_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources_module, "COMPILER", "no-such-distribution")
    assert compiler_version() is None


def test_kernel_is_opened_once_per_process(variant, tmp_path, monkeypatch):
    path = put(tmp_path / "prebuilt", variant)
    opened = []
    monkeypatch.setattr(finder, "_open", lambda path, gpu: opened.append(path) or (lambda: "launched"))
    assert [load(variant)(), load(Variant("toy.kernels.gemm", {"tile": 128}))()] == ["launched", "launched"]
    assert opened == [path]


def test_preparing_happens_once_in_a_thread_and_leaves_errors_to_load(variant, tmp_path, monkeypatch):
    threads = []

    def share():
        threads.append(threading.current_thread())
        raise RuntimeError("no GPU")

    put(tmp_path / "prebuilt", variant)
    monkeypatch.setattr(finder, "_share_tvm_ffi", lambda: None)
    monkeypatch.setattr(finder, "_share_cuda_runtime", share)
    prepare.cache_clear()
    prepare()
    prepare()
    for thread in threading.enumerate():
        if thread.name == "cute_runtime.prepare":
            thread.join()
    assert [thread.name for thread in threads] == ["cute_runtime.prepare"]
    with pytest.raises(RuntimeError, match="no GPU"):
        load(variant)
    assert threads[1:] == [threading.current_thread()]
    prepare.cache_clear()


def test_import_is_light():
    code = "import sys, cute_runtime; print(sorted({'cutlass', 'torch', 'tvm_ffi', 'rich', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_source_of_many_objects_is_read_once(variant, tmp_path, monkeypatch):
    variants = [Variant(variant.kernel, {"tile": tile}) for tile in (64, 128)]
    for each in variants:
        put(tmp_path / "prebuilt", each)
    read = []
    monkeypatch.setattr(sources_module.Path, "read_bytes", lambda path: read.append(path.name) or path.open("rb").read())
    assert [finder.find(each).name for each in variants] == [object_name(each) for each in variants]
    assert read.count("gemm.py") == 1
    (tmp_path / "src" / "toy" / "kernels" / "gemm.py").write_text("M = 64\n")
    assert finder.changed_sources(split_object(tmp_path / "prebuilt" / object_name(variant))[0].sources) == ["toy/kernels/gemm.py"]
