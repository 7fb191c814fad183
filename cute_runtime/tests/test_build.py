"""Building a real kernel for sm_90a on this machine: what comes out, what is left behind, and what is said when it fails."""

import ctypes
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import cute_runtime
from cute_runtime import KernelCompileError, MissingToolError, Variant, builder, emulator, read_resources
from cute_runtime import build as build_function
from cute_runtime import sources as sources_module
from cute_runtime.cli import main
from cute_runtime.objects import split_object

KERNEL = '''
"""y = x + ADDEND, with an array that does not fit in registers where ``spill`` is true."""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream
from toy.kernels import constants


@cute.kernel
def _kernel(x: cute.Tensor, y: cute.Tensor, spill: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    i = cute.arch.block_idx()[0] * 128 + thread
    if i < x.shape[0]:
        if cutlass.const_expr(spill):
            table = cute.make_rmem_tensor((64,), cutlass.Float32)
            for j in cutlass.range(64, unroll=1):
                table[(i * j) % 64] = x[j]
            y[i] = table[cutlass.Int32(x[i])]
        else:
            y[i] = x[i] + constants.ADDEND


@cute.jit
def _launch(x: cute.Tensor, y: cute.Tensor, spill: cutlass.Constexpr, stream: cuda.CUstream):
    _kernel(x, y, spill).launch(grid=[cute.ceil_div(x.shape[0], 128), 1, 1], block=[128, 1, 1], stream=stream)


def trace(*, spill):
    try:
        import torch
    except ImportError:
        pass
    else:
        raise RuntimeError("torch was loaded to compile a kernel")
    n = cute.sym_int()
    x, y = (make_fake_compact_tensor(cutlass.Float32, (n,)) for _ in range(2))
    return _launch, (x, y, spill, make_fake_stream(use_tvm_ffi_env_stream=True))
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a package of kernels whose ``__init__`` must not run."""
    root = tmp_path_factory.mktemp("src")
    kernels = root / "toy" / "kernels"
    kernels.mkdir(parents=True)
    (root / "toy" / "__init__.py").write_text("raise RuntimeError('the package is not imported to compile its kernels')\n")
    (kernels / "add.py").write_text(KERNEL)
    (kernels / "constants.py").write_text("ADDEND = 1.5\n")
    (kernels / "broken.py").write_text("def trace():\n    raise RuntimeError('tile 96 does not divide 128')\n")
    (kernels / "variants.py").write_text(
        textwrap.dedent("""\
            from cute_runtime import Variant

            def prebuilt_variants():
                return [Variant("toy.kernels.add", {"spill": spill}) for spill in (False, True)]
            """)
    )
    sys.path.insert(0, str(root))
    sources_module.package_folder.cache_clear()
    yield root
    sys.path.remove(str(root))
    sources_module.package_folder.cache_clear()


@pytest.fixture(scope="module")
def out(toy, tmp_path_factory):
    """Both variants of the toy kernel, built by the command in a process whose working folder is watched."""
    out = tmp_path_factory.mktemp("out")
    cwd = tmp_path_factory.mktemp("cwd")
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    environment["PYTHONPATH"] = os.pathsep.join([str(toy), str(Path(cute_runtime.__file__).parents[1])])
    command = [sys.executable, "-m", "cute_runtime", "build", "--package", "toy", "--out", str(out), "--jobs", "2", "--json"]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(cwd.iterdir()) == []
    assert json.loads(result.stdout) == {name: str(out / f"{name}.so") for name in ("toy.add-spill.false", "toy.add-spill.true")}
    return out


@pytest.fixture(scope="module")
def resources(out):
    """Of both objects, by variant: the disassembler takes a second for each."""
    return {variant: read_resources(out / f"{variant.name}.so")[0] for variant in (ADD, SPILLING)}


@pytest.fixture
def read_before(resources, monkeypatch):
    """The commands find what was read before."""
    known = {f"{variant.name}.so": [one] for variant, one in resources.items()}
    monkeypatch.setattr("cute_runtime.cli.read_resources", lambda path: known[path.name])


ADD = Variant("toy.kernels.add", {"spill": False})
SPILLING = Variant("toy.kernels.add", {"spill": True})


def test_build_leaves_the_objects_and_nothing_else(out):
    assert sorted(path.name for path in out.iterdir()) == [f"{ADD.name}.so", f"{SPILLING.name}.so"]


def test_emulator_leaves_the_object_as_it_is_and_runs_the_kernel(out, tmp_path, monkeypatch):
    """Its own compilation keeps the PTX beside the object, not in it."""
    monkeypatch.setenv("SONICMOE_CACHE", str(tmp_path))
    files = emulator.compiled(SPILLING)
    assert files.object.read_bytes() == (out / f"{SPILLING.name}.so").read_bytes()
    assert ".visible .entry" in files.ptx.read_text()
    x, y = np.arange(200, dtype=np.float32) % 64, np.zeros(200, np.float32)
    expected = np.full_like(y, np.nan)
    for i in range(200):
        table = np.full(64, np.nan, np.float32)  # local memory, where the thread has not written
        for j in range(64):
            table[i * j % 64] = x[j]
        expected[i] = table[int(x[i])]
    (statistics,) = emulator.launch(SPILLING, x, y)
    np.testing.assert_array_equal(y, expected)
    assert (statistics.grid, statistics.block) == ((2, 1, 1), (128, 1, 1))


def test_object_exports_the_function_that_load_calls(out):
    content = (out / f"{ADD.name}.so").read_bytes()
    assert content.startswith(b"\x7fELF")
    assert b"__tvm_ffi_kernel\0" in content
    assert b"libcute_dsl_runtime" not in content


def test_manifest_says_what_the_object_was_made_from(out):
    manifest, _ = split_object(out / f"{ADD.name}.so")
    assert manifest.variant == ADD.name
    assert manifest.arch == "sm_90a"
    assert manifest.compiler == f"nvidia-cutlass-dsl {sources_module.compiler_version()}"
    assert {"toy/kernels/add.py", "toy/kernels/constants.py"} <= set(manifest.sources)
    assert manifest.sources == sources_module.sources(ADD)


def test_resources_are_read_from_the_machine_code(resources):
    plain = resources[ADD]
    assert "kernel" in plain.function
    assert 8 <= plain.registers <= 32
    assert plain.threads == 128
    assert plain.instructions > 10
    assert plain.hgmma == 0
    assert not plain.uses_local_memory


def test_local_memory_is_noticed(resources):
    spilling = resources[SPILLING]
    assert spilling.uses_local_memory
    assert spilling.stl > 0
    assert spilling.ldl > 0
    assert spilling.stack_bytes >= 256


def test_inspect_prints_the_same_numbers_as_json(out, toy, resources, capsys):
    assert main(["inspect", "--package", "toy", "--dir", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [dataclasses.asdict(one) for one in resources.values()]


@pytest.mark.parametrize(
    ("variant", "options", "fault"),
    [
        (ADD, [], None),
        (ADD, ["--wgmma", "dispatch.*"], None),
        (ADD, ["--wgmma", "dispatch.*", "--wgmma", "toy.*"], "no HGMMA instruction in .*: its products must run on wgmma"),
        (SPILLING, [], r"[0-9]+ bytes of stack, .* loads and [0-9]+ stores in .*: must be none"),
    ],
)
def test_check_fails_for_what_must_not_be_in_machine_code(out, toy, read_before, capsys, variant, options, fault):
    assert main(["inspect", "--variant", variant.name, "--dir", str(out), "--check", *options]) == (1 if fault else 0)
    faults = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cute_runtime: ")]
    assert len(faults) == (1 if fault else 0)
    if fault:
        assert re.match(rf"cute_runtime: {re.escape(variant.name)}: {fault}", faults[0])


def test_build_checks_what_it_built(out, toy, read_before, capsys):
    assert main(["build", "--package", "toy", "--out", str(out), "--quiet", "--check"]) == 1
    (fault,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cute_runtime: ")]
    assert fault.startswith(f"cute_runtime: {SPILLING.name}: ")


def test_registers_beyond_a_block_are_a_fault(resources):
    assert resources[ADD].faults() == []
    (fault,) = dataclasses.replace(resources[ADD], registers=129, threads=512).faults()
    assert "129 registers for each of 512 threads" in fault
    assert fault.endswith("must be at most 65536 together")


def test_current_object_is_kept_and_stale_one_rebuilt(out, toy, monkeypatch):
    path = out / f"{ADD.name}.so"
    before = path.stat().st_mtime_ns
    steps = []
    monkeypatch.setattr(builder, "run_compile_step", lambda variant, *_: steps.append(variant) or split_object(path)[1])
    assert build_function(ADD, out) == path
    assert (steps, path.stat().st_mtime_ns) == ([], before)
    constants = toy / "toy" / "kernels" / "constants.py"
    constants.write_text("ADDEND = 2.5\n")
    try:
        build_function(ADD, out)
    finally:
        constants.write_text("ADDEND = 1.5\n")
    assert steps == [ADD]


def test_full_disk_is_one_sentence_and_leaves_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "run_compile_step", lambda *_: bytes(1000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(ValueError, match=r"^out_dir='.*': cannot be written \(File too large\)$"):
            build_function(ADD, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_kernel_that_does_not_compile_is_named_and_its_log_kept(toy, tmp_path):
    broken = Variant("toy.kernels.broken")
    with pytest.raises(KernelCompileError, match=r"toy.broken: does not compile \(.*tile 96 does not divide 128\); the log is ") as caught:
        build_function(broken, tmp_path)
    assert caught.value.log == tmp_path / "toy.broken.log"
    assert "Traceback" in caught.value.log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["toy.broken.log"]


def test_missing_compiler_says_how_to_get_it(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "compiler_version", lambda: None)
    with pytest.raises(MissingToolError, match=r'nvidia-cutlass-dsl is not installed: .* pip install "sonicmoe\[compile\]"'):
        build_function(ADD, tmp_path)


def test_missing_c_compiler_says_how_to_get_it(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(MissingToolError, match=r"no C compiler 'no-such-cc' on PATH: .* apt install gcc"):
        build_function(ADD, tmp_path)
    assert main(["build", "--variant", ADD.name, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cute_runtime: no C compiler")


def test_missing_disassembler_says_how_to_get_it(out, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingToolError, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        read_resources(out / f"{ADD.name}.so")


def test_a_check_without_disassembler_fails_before_anything_is_compiled(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["build", "--variant", ADD.name, "--out", str(tmp_path / "out"), "--check"]) == 2
    assert "cuobjdump and nvdisasm not found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--variant", "nonsense", "--out", "OUT"], "variant='nonsense': must be"),
        (["build", "--variant", "toy.absent", "--out", "OUT"], "kernel='toy.kernels.absent': there is no module"),
        (["build", "--variant", ADD.name, "--out", "/dev/null/x"], "out_dir='/dev/null/x': cannot be made a folder"),
        (["list", "--package", "json"], "package='json': must have a module json.kernels.variants"),
        (["list", "--package", "toy", "--variant", ADD.name], "--variant: must not be combined with --package"),
        (["inspect", "--variant", ADD.name, "--dir", "OUT"], f"{ADD.name}: no object in"),
        (["build", "--variant", ADD.name, "--out", "OUT", "--wgmma", "*"], "--wgmma *: must come with --check"),
    ],
)
def test_bad_request_is_one_line_and_exit_code_2(toy, tmp_path, capsys, arguments, message):
    assert main([str(tmp_path) if argument == "OUT" else argument for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"cute_runtime: {message}")
    assert "Traceback" not in captured.err


def test_list_as_json_names_the_variants(toy, capsys):
    assert main(["list", "--package", "toy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": SPILLING.name, "kernel": "toy.kernels.add", "params": {"spill": True}}


def test_object_is_a_loadable_shared_object(out, tmp_path):
    """The manifest behind it does not disturb the loader, and only CUDA's and tvm_ffi's functions are left to be found."""
    source = tmp_path / "stubs.c"
    undefined = subprocess.run(["nm", "-D", "--undefined-only", out / f"{ADD.name}.so"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in undefined.splitlines() if "@" not in line and " U " in line]
    assert names
    assert all(name.startswith(("cuda", "cu", "TVMFFI")) for name in names)
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    subprocess.run(["cc", "-fPIC", "-shared", "-w", "-o", tmp_path / "stubs.so", source], check=True)
    ctypes.CDLL(str(tmp_path / "stubs.so"), ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(out / f"{ADD.name}.so")).__tvm_ffi_kernel
