"""The kernels with planted defects are built beforehand: which they are, where they go, and that a worker finds them without a compiler."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cute_runtime
from cute_runtime import Variant, builder
from cute_runtime.emulator import h100_properties
from cute_runtime.objects import object_name, write_object
from cute_runtime.sources import sources
from sonicmoe import backends
from testing.matrix import __main__ as command
from testing.matrix import checks_layer, plan, planting_build, pool, runner
from testing.matrix.cells import LayerCell, load_matrix
from testing.matrix.defects_kernels import KERNEL_DEFECTS
from testing.matrix.kernels import cell_variants
from testing.matrix.located import MatrixError
from testing.matrix.planting_build import build_planted, missing_kernels, planted_kernels
from testing.matrix.planting_source import ROOT, folder_name, planted_folders

MATRIX = load_matrix()
HOPPER = MATRIX.profiles["hopper"]
CELLS = {cell.name: cell for cell in MATRIX.cells}
ROUNDS, TIES = "kernel: rounds up from a quarter of a tile", "kernel: the higher expert wins a tie"


@pytest.fixture
def loads_of(monkeypatch):
    """The names of what a layer cell loads: its host halves take CPU tensors for those of an sm_90 GPU, and its kernels do nothing."""
    names, properties = set(), h100_properties()

    def load(variant):
        names.add(variant.name)
        return lambda *args: None

    for name in ("hopper", "reference"):
        backends.load(name)
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("cute_runtime", "dispatch", "routing", "sonicmoe")]
    caches = [value for module in ours for value in vars(module).values() if hasattr(value, "cache_clear")]
    for module in ours:
        for name in {"is_hopper", "is_supported_device"} & vars(module).keys():
            monkeypatch.setattr(module, name, lambda device: True)
    monkeypatch.setattr(cute_runtime, "load", load)
    monkeypatch.setattr(cute_runtime, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def run(cell, memory_clock_rate):
        properties.memory_clock_rate = memory_clock_rate
        names.clear()
        for cache in caches:
            cache.cache_clear()
        problem = checks_layer.make_problem(cell, HOPPER, 1, "cpu")
        checks_layer.run_layer(cell, problem)
        with torch.no_grad():
            checks_layer._forward(cell, problem, problem.x, problem.router_weight, problem.parameters)
        return {*names}

    yield run
    for cache in caches:
        cache.cache_clear()


def test_a_defects_cell_loads_what_is_listed_for_it(loads_of):
    """Of its experts exactly that on an H100 and an H200 together, under top-K, where the rows are known beforehand."""
    cells = [CELLS[name] for name in sorted({defect.cell for defect in KERNEL_DEFECTS.values()})]
    layers = [cell for cell in cells if isinstance(cell, LayerCell)]
    assert len(layers) > 8
    for cell in layers:
        loaded, listed = loads_of(cell, 2_619_000) | loads_of(cell, 3_201_000), {variant.name for variant in cell_variants(cell, HOPPER)}
        assert loaded - listed == set(), cell.name
        if cell.routing.method == "top_k":
            assert {name for name in listed - loaded if name.startswith("sonicmoe.")} == set(), cell.name


def test_every_defect_has_kernels_and_no_two_share_an_object():
    kernels = planted_kernels(KERNEL_DEFECTS, MATRIX, HOPPER)
    assert {kernel.defect for kernel in kernels} == KERNEL_DEFECTS.keys()
    paths = {(folder_name(kernel.defect), object_name(kernel.variant)) for kernel in kernels}
    assert len(paths) == len(kernels) > 100
    gather_sums = [kernel for kernel in kernels if kernel.defect == "kernel: score not applied in the sum"]
    assert {kernel.variant.kernel for kernel in gather_sums} == {"dispatch.kernels.gather_sum"}


def test_every_kernel_of_the_backward_has_a_defect():
    kernels = {kernel.variant.kernel.rpartition(".")[2] for kernel in planted_kernels(KERNEL_DEFECTS, MATRIX, HOPPER)}
    assert kernels >= {"activation_backward", "score_grad", "weight_grad", "bias_grad", "dx_rows"}


def test_defects_of_one_gpu_fit_into_its_memory_side_by_side():
    needed = sorted(plan.memory_bytes(CELLS[defect.cell], HOPPER) for defect in KERNEL_DEFECTS.values())
    assert sum(needed[-4:]) < HOPPER.memory_gib * 2**30


def stand_in(tree, variant, out):
    """As `compile_in`, with the name of the tree's fault for an object."""
    digests = {name: hashlib.sha256((tree / name).read_bytes()).hexdigest() for name in sources(variant)}
    facts = {"variant": variant, "key": "", "compiler": "none", "arch": "sm_90a", "sources": digests}
    out.mkdir(parents=True, exist_ok=True)
    write_object(out / object_name(variant), tree.name.encode(), **facts)
    return ""


def build(names, out, compile_one=stand_in):
    defects = {name: KERNEL_DEFECTS[name] for name in names}
    told = []
    failed = build_planted(
        defects,
        planted_kernels(defects, MATRIX, HOPPER),
        out,
        jobs=2,
        compile_one=compile_one,
        ended=lambda *words: told.append(words),
    )
    return failed, told


FIND = """
import sys
from pathlib import Path
from testing.matrix.defects_kernels import KERNEL_DEFECTS
from testing.matrix.planting_source import import_planted
defect, *variants = sys.argv[1:]
tree = import_planted(defect, KERNEL_DEFECTS[defect])
import cute_runtime
assert Path(cute_runtime.__file__).is_relative_to(tree.name)
sys.modules["cute_runtime.load"].compiler_version = lambda: None
for variant in variants:
    print(cute_runtime.find(cute_runtime.Variant.from_name(variant)))
"""


def find(defect, variants, folders):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SONICMOE_KERNELS": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", FIND, defect, *variants]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def test_a_worker_finds_the_object_with_its_defect_without_a_compiler_and_without_a_word(tmp_path):
    """The ordinary objects lie in the same folder; one of a kernel without the fault is taken, one with the fault's kernel is stale."""
    failed, told = build([ROUNDS, TIES], tmp_path)
    assert failed == []
    assert sorted(line for line, _, _ in told)[0] == f"{ROUNDS}: routing.rounding_select-mode.nearest"
    for name in ("routing.rounding_select-mode.nearest", "dispatch.bounds"):
        stand_in(ROOT, Variant.from_name(name), tmp_path)
    found = find(ROUNDS, ["routing.rounding_select-mode.nearest", "dispatch.bounds"], [tmp_path])
    planted, ordinary = map(Path, found.stdout.splitlines())
    assert planted == tmp_path / folder_name(ROUNDS) / "routing.rounding_select-mode.nearest.so"
    assert planted.read_bytes().startswith(folder_name(ROUNDS).encode())
    assert ordinary == tmp_path / "dispatch.bounds.so"
    assert found.stderr == ""


def test_an_object_with_the_defect_that_does_not_fit_any_more_is_named(tmp_path):
    stand_in(ROOT, Variant.from_name("routing.rounding_select-mode.nearest"), tmp_path / folder_name(ROUNDS))
    stand_in(ROOT, Variant.from_name("routing.rounding_select-mode.nearest"), tmp_path)
    found = find(ROUNDS, ["routing.rounding_select-mode.nearest"], [tmp_path])
    lines = [line for line in found.stderr.splitlines() if "is stale" in line]
    assert [Path(line.partition(":")[0]).parent for line in lines] == [tmp_path / folder_name(ROUNDS)]
    assert "MissingKernelError: routing.rounding_select-mode.nearest: no usable prebuilt object" in found.stderr


def test_what_is_missing_is_known_before_anything_runs(tmp_path, monkeypatch):
    defects = {name: KERNEL_DEFECTS[name] for name in (ROUNDS, TIES)}
    monkeypatch.setenv("SONICMOE_KERNELS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert planted_folders(ROUNDS) == [tmp_path / place / "kernel-rounds-up-from-a-quarter-of-a-tile" for place in ("a", "b")]
    everything = planted_kernels(defects, MATRIX, HOPPER)
    assert missing_kernels(defects, MATRIX, HOPPER) == everything
    build([ROUNDS], tmp_path / "b")
    build([TIES], tmp_path / "a", compile_one=lambda tree, variant, out: stand_in(ROOT, variant, out))
    assert {kernel.defect for kernel in missing_kernels(defects, MATRIX, HOPPER)} == {TIES}, "without the fault it does not count"


def test_missing_kernels_are_announced_or_refused_where_none_can_be_compiled(monkeypatch, capsys):
    defects = {name: KERNEL_DEFECTS[name] for name in (ROUNDS, TIES)}
    monkeypatch.delenv("SONICMOE_KERNELS", raising=False)
    count = len(planted_kernels(defects, MATRIX, HOPPER))
    monkeypatch.setattr("cute_runtime.sources.compiler_version", lambda: "1.0")
    command._look_for_defects(defects, MATRIX, HOPPER)
    assert capsys.readouterr().err.startswith(
        f"{count} kernels with defects are not built from these sources: compiled on the way where the cache lacks them;"
    )
    monkeypatch.setattr("cute_runtime.sources.compiler_version", lambda: None)
    with pytest.raises(
        MatrixError, match=f"^{count} kernels with defects are not built from these sources, and nvidia-cutlass-dsl is not installed"
    ):
        command._look_for_defects(defects, MATRIX, HOPPER)


@pytest.mark.parametrize(("why", "code"), [("", 0), ("does not compile", 1)])
def test_the_command_builds_the_defects_that_are_asked_for(tmp_path, monkeypatch, capsys, why, code):
    monkeypatch.setattr(planting_build, "compile_in", lambda tree, variant, out: why)
    monkeypatch.setattr(builder, "tools", lambda: ("1.0", "cc"))
    assert command.main(["selftest", "--defects", "kernel: rounds*", "--build", str(tmp_path), "--jobs", "1", "--json"]) == code
    out, err = capsys.readouterr()
    label = f"{ROUNDS}: routing.rounding_select-mode.nearest"
    assert json.loads(out) == {"folder": str(tmp_path), "kernels": 1 - code, "failed": [label] * code}
    assert err == f"[1/1] {'FAILED ' * code}{label}{': ' * code}{why}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defects", "gate and up*"], "--defects gate and up*: matches none of the"),
        (["--profile", "cpu"], "--profile cpu: kernels are of the hopper profile"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(builder, "tools", lambda: ("1.0", "cc"))
    assert command.main(["selftest", *words, "--build", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_runs_side_by_side_take_the_gpus_in_turn(tmp_path, monkeypatch):
    taken = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pool, "run_jobs", lambda jobs, setup, *, environments, memory_bytes: taken.append(environments) or iter(()))
    for number in range(3):
        options = runner.RunOptions(1, 1, tmp_path, 1, 1, None, False, 2, "test", first_gpu=number)
        cell = CELLS["tokens/t129"]
        list(runner._measure(MATRIX, HOPPER, options, [cell], 1, None, runner.Steps(1, quiet=True), None))
    assert [environments[0]["CUDA_VISIBLE_DEVICES"] for environments in taken[::3]] == ["0", "1", "0"]
