"""The suites of testing.measure at tiny sizes on a CPU: real values, planted defects that must fail, and what a process's start tells."""

import contextlib
import importlib
import json
import math
import subprocess
import threading
from pathlib import Path

import pytest
import torch

import cute_runtime
import dispatch
from cute_runtime import checks
from cute_runtime.emulator import h100_properties
from dispatch import chunk_counts
from routing import RouterConfig
from sonicmoe import devices
from sonicmoe.backends import arguments, hopper, hopper_backward, reference
from sonicmoe.tests.stand_ins import standing_in
from testing.matrix.results import FAILED, NOT_RUN, PASSED
from testing.measure import decode, first_call, host_time, kernels, memory, registry, run, start, step
from testing.measure.__main__ import main
from testing.measure.items import MEASURED, TINY, TINY_TILE, Bound, Item, Options, cell, differing

QUICK = Options(torch.device("cpu"), "reference", True, 3)
FULL = Options(torch.device("cuda"), "hopper", False, 3)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("measure") / "result.json"
    assert main(["all", "--quick", "--device", "cpu", "--seed", "3", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def of(result, start_of_name):
    return {cell["name"]: cell for cell in result["cells"] if cell["name"].startswith(start_of_name)}


def measured(name):
    """The cells of one item, by the end of their names."""
    (item,) = [item for item in registry.load(name.split("/")[0]).items(QUICK) if item.name == name]
    return {cell["name"].removeprefix(name).strip("/"): cell for cell in run.run_item(item)}


def test_what_needs_a_gpu_is_not_run_with_the_reason_and_never_passed(result):
    missing = {cell["name"]: cell["why"] for cell in result["cells"] if cell["status"] == NOT_RUN}
    assert set(missing) == {
        "dispatch/count_cumsum/1000-16-int32/graph", "dispatch/count_cumsum/1000-16-int64/graph", "start/compiled",
        "memory/peak/48-32-16-8-2", "step/graph/top_k", "step/graph/token_rounding", "step/no-wait/top_k", "step/no-wait/token_rounding",
        *(f"sanitizer/{tool}/plan" for tool in ("memcheck", "racecheck", "synccheck")), "sanitizer/memcheck/control",
    }  # fmt: skip
    assert all("needs an sm_90 GPU" in why for why in missing.values())
    assert all(cell["passed"] is None for cell in result["cells"] if cell["status"] in (NOT_RUN, MEASURED))


def test_what_holds_anywhere_is_judged_on_a_cpu(result):
    assert {cell["name"] for cell in result["cells"] if cell["status"] == PASSED} == {
        "rounding/wasted-rows", "memory/saved-by-experts/48-32-16-8-2", "step/compiled/top_k/weights", "step/compiled/top_k/losses",
        "step/compiled/token_rounding/weights", "step/compiled/token_rounding/losses", "step/twice/top_k", "step/twice/token_rounding",
        "dispatch/router-logits/48-32-8",
        *(f"kernels/{kernel}/48-32-16-8-2" for kernel in (
            "up-(training)", "up-(inference)", "down", "activation-backward", "dW_down", "dx-rows", "dW_up", "gather-sum"
        )),
    }  # fmt: skip
    assert [cell["name"] for cell in result["cells"] if cell["status"] == FAILED] == []


def test_a_result_says_where_and_how_it_was_measured(result):
    assert {"device", "driver", "power_limit_w", "versions", "commit", "dirty", "date", "command"} <= set(result)
    ran = {"suites": list(registry.SUITES), "items": None, "quick": True, "seed": 3, "backend": "reference", "complete": True}
    assert {key: result[key] for key in ran} == ran


def test_times_of_the_parts_of_a_layer_are_recorded(result):
    (counting,) = of(result, "dispatch/count_cumsum/1000-16-int32/eager").values()
    assert counting["bound"]["value"] == counting["ms"] / counting["bincount_ms"]
    for one in of(result, "dispatch/logits-to-plan/").values():
        assert one["bound"]["value"] == one["ms"] / min(one["inference_ms"], one["forward_ms"])
    (product,) = of(result, "dispatch/router-logits/48-32-8").values()
    assert product["floor_share"] == product["floor_ms"] / product["ms"] > 0
    assert min(product["mm_ms"], product["host_ms"], product["mm_host_ms"]) > 0
    for one in of(result, "dispatch/plan").values():
        assert min(one[key] for key in ("ms", "eager_ms", "host_ms", "reference_ms", "reference_eager_ms")) > 0


def test_rounded_rows_fill_their_tiles_and_top_ks_do_not(result):
    cells = of(result, "rounding/")
    rows = cells["rounding/inference"]
    assert rows["rows"] % TINY_TILE == 0
    assert rows["top_k_rows"] == TINY.rows
    assert rows["ns_per_row"] == pytest.approx(rows["ms"] * 1e6 / rows["rows"])
    assert cells["rounding/wasted-rows"]["top_k_wasted_ratio"] > 0


def test_experts_save_z_and_little_more(result):
    (experts,) = of(result, "memory/saved-by-experts").values()
    (layer,) = of(result, "memory/saved-by-layer").values()
    assert experts["z_mib"] == TINY.rows * 2 * TINY.I * 2 / 2**20
    assert experts["z_mib"] < experts["saved_mib"] < 1.4 * experts["z_mib"]
    assert layer["saved_mib"] > experts["saved_mib"]


def test_a_fresh_process_reports_its_first_call(result):
    (one,) = of(result, "start/prebuilt").values()
    assert one["start_s"] == pytest.approx((one["import_ms"] + one["first_ms"]) / 1e3)
    assert min(one["context_ms"], one["make_ms"], one["second_ms"], one["product_ms"]) > 0
    assert sum(one[part] for part in first_call.PARTS) + one["rest_ms"] == pytest.approx(one["first_ms"])


def test_a_first_calls_parts_are_each_without_those_that_they_call(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(first_call.time, "perf_counter", lambda: now[0])
    loader, launches = (importlib.import_module(f"cute_runtime.{name}") for name in ("load", "launches"))

    def takes(seconds, result=None):
        def function(*_):
            now[0] += seconds
            return result

        return function

    def open_object(path, *, gpu):
        now[0] += 4
        loader._share_tvm_ffi()
        return "kernel"

    for name, value in {"find": takes(1, "path"), "_share_tvm_ffi": takes(2), "_open": open_object, "_loaded": {}}.items():
        monkeypatch.setattr(loader, name, value)
    monkeypatch.setattr(launches, "one_call", lambda kernel: takes(8, kernel))
    clock = first_call.Clock()
    restore = clock.watch()
    other = threading.Thread(target=loader._share_tvm_ffi)  # as cute_runtime.prepare's
    other.start()
    other.join()
    assert launches.one_call(cute_runtime.load(cute_runtime.Variant("toy.kernels.gemm")))() == "kernel"
    restore()
    assert loader._open is open_object
    wanted = {"find_ms": 1e3, "libraries_ms": 2e3, "open_ms": 4e3, "launch_ms": 8e3}
    assert clock.ms == dict.fromkeys(first_call.PARTS, 0) | wanted


def test_losses_of_training_fall_and_are_recorded(result):
    losses = of(result, "step/compiled/top_k/losses")["step/compiled/top_k/losses"]["losses"]
    assert len(losses) == step.STEPS
    assert losses[-1] != losses[0]


@pytest.mark.parametrize(
    ("value", "rule", "holds"), [(0.9, "under", True), (1.0, "under", False), (1.0, "at most", True), (1.1, "at most", False)]
)
def test_bounds_are_judged_on_the_kernels_at_full_size_only(value, rule, holds):
    bound = Bound(value, "MiB", 1.0, rule)
    judged = cell(FULL, "a/b", mode="b", bound=bound)
    assert (judged["status"], judged["passed"]) == ((PASSED, True) if holds else (FAILED, False))
    assert judged["why"] == ("" if holds else f"{value:.4g} MiB: must be {rule} 1")
    quick = cell(QUICK, "a/b", mode="b", bound=bound)
    assert (quick["status"], quick["passed"]) == (MEASURED, None)


@pytest.mark.parametrize("rule", ["under", "at most"])
def test_not_a_number_never_passes(rule):
    item = Item("a/b", lambda: [cell(FULL, "a/b", mode="b", bound=Bound(math.nan, "MiB", 1.0, rule), losses=[1.0, math.inf])])
    (judged,) = run.run_item(item)
    assert judged["passed"] is False
    assert (judged["bound"]["value"], judged["losses"]) == (None, [1.0, None])


def test_bits_are_compared_and_not_values():
    zeros = torch.tensor([0.0, math.nan, 1.0])
    assert differing(zeros, torch.tensor([-0.0, math.nan, 1.0])) == 1
    assert differing(zeros, zeros.double()) == 3
    assert differing(torch.zeros(0), torch.zeros(0)) == 0


def test_what_breaks_is_a_failed_cell_and_the_rest_still_runs(tmp_path, monkeypatch, capsys):
    right = dispatch.count_cumsum
    monkeypatch.setattr(dispatch, "count_cumsum", lambda ids, *args, **options: right(ids[ids.dtype == torch.int32 :], *args, **options))
    out = tmp_path / "result.json"
    assert main(["dispatch", "--quick", "--device", "cpu", "--items", "*count*eager", "--out", str(out)]) == 1
    cells = {cell["name"].split("/")[2]: cell for cell in json.loads(out.read_text())["cells"]}
    assert (cells["1000-16-int32"]["status"], cells["1000-16-int64"]["status"]) == (FAILED, MEASURED)
    assert "differs from torch.bincount + cumsum for" in cells["1000-16-int32"]["why"]
    assert "FAIL: 1 failed, 1 measured (quick)" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_had_measured(tmp_path, monkeypatch, capsys):
    items, out = memory.items(QUICK), tmp_path / "result.json"

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "items", lambda options: [items[0], Item("memory/peak/x", interrupt)])
    assert main(["memory", "--quick", "--device", "cpu", "--out", str(out)]) == 130
    result = json.loads(out.read_text())
    assert ([cell["name"] for cell in result["cells"]], result["complete"]) == ([items[0].name], False)
    assert capsys.readouterr().err.endswith(f"interrupted; {out} has the items that had ended\n")


def test_a_run_that_changes_its_bits_fails(monkeypatch):
    right = reference.down_projection
    monkeypatch.setattr(reference, "down_projection", lambda *args: right(*args) * (1 + 0.1 * torch.rand(())))
    (one,) = measured("step/twice/top_k").values()
    assert one["status"] == FAILED
    assert "elements with other bits in a second run" in one["why"]
    assert "o: " in one["why"]


def test_a_compiled_model_with_other_gradients_fails(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: model(x * 1.5))
    cells = measured("step/compiled/top_k")
    assert (cells["weights"]["status"], cells["losses"]["status"]) == (FAILED, FAILED)


def test_rows_that_fill_no_tile_fail(monkeypatch):
    monkeypatch.setattr(Options, "rounding", lambda self, k: RouterConfig(k=k, tile_m=TINY_TILE))
    (wasted,) = [one for name, one in measured("rounding/beside-top_k").items() if name.endswith("wasted-rows")]
    assert wasted["status"] == FAILED
    assert wasted["bound"]["value"] > 0


def test_one_more_tensor_saved_for_backward_fails(monkeypatch, result):
    right = memory.routed_experts
    monkeypatch.setattr(memory, "routed_experts", lambda x, *args, **options: right(x, *args, **options) * torch.ones_like(x))
    (one,) = measured("memory/saved-by-experts/48-32-16-8-2").values()
    assert one["status"] == FAILED
    (right_one,) = of(result, "memory/saved-by-experts").values()
    assert one["saved_mib"] - right_one["saved_mib"] == pytest.approx(TINY.T * TINY.H * 2 / 2**20)


class Process:
    """Stands in for subprocess.run: each child writes its objects into the cache and reports its numbers."""

    def __init__(self, monkeypatch, *children):
        self.children = list(children)
        monkeypatch.setattr(start.subprocess, "run", self)

    def __call__(self, command, *, env, **options):
        child = self.children.pop(0)
        if "error" in child:
            return subprocess.CompletedProcess(command, 1, "", f"Traceback ...\n{child['error']}\n")
        for name in child.get("objects", ()):
            path = Path(env[start.CACHE_VARIABLE]) / "key" / f"{name}.so"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        times = dict.fromkeys(("context_ms", "import_ms", "make_ms", "second_ms"), 1.0) | {"first_ms": child["first_ms"]}
        found = {**times, "finite": child.get("finite", True), "compiler_imported": child.get("compiler", False)}
        found["modules_without_bytecode"] = child.get("anew", 0)
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")


@pytest.mark.parametrize(
    ("child", "status", "why"),
    [
        ({"first_ms": 150.0}, PASSED, ""),
        ({"first_ms": 250.0}, FAILED, "0.251 s to the first result: must be under 0.2"),
        ({"first_ms": 250.0, "anew": 45}, FAILED, "0.251 s to the first result: must be under 0.2; 45 modules had no bytecode"),
        ({"first_ms": 1.0, "objects": ["top_k"]}, NOT_RUN, "not prebuilt here and compiled instead: top_k"),
        (
            {"error": "cute_runtime.load.MissingKernelError: top_k: no usable prebuilt object in /some/folder, and no compiler"},
            NOT_RUN,
            "top_k: no usable prebuilt object",
        ),
        ({"error": "ValueError: no"}, FAILED, "RuntimeError: the process ended with 1: ValueError: no"),
        ({"first_ms": 1.0, "compiler": True}, FAILED, "RuntimeError: the process imported the compiler"),
        ({"first_ms": 1.0, "finite": False}, FAILED, "RuntimeError: the process's output has values that are not finite"),
    ],
)
def test_a_start_counts_only_where_all_kernels_were_prebuilt(monkeypatch, child, status, why):
    Process(monkeypatch, *[child] * start.PROCESSES)
    item = next(item for item in start.items(FULL) if item.name == "start/prebuilt/inference")
    (one,) = run.run_item(item)
    assert (one["status"], one["why"]) == (status, why)


def test_a_compiling_start_is_followed_by_one_from_the_cache(monkeypatch):
    monkeypatch.setattr(start, "compiler_version", lambda: "4.8.1")
    compiling = {"first_ms": 9000.0, "objects": ["sonicmoe.kernels.up_projection__x"], "compiler": True}
    item = next(item for item in start.items(FULL) if item.name == "start/compiled")
    Process(monkeypatch, compiling, *[{"first_ms": ms} for ms in (700.0, 100.0, 800.0)])
    first, later = run.run_item(item)
    assert (first["status"], first["start_s"]) == (PASSED, 9.001)
    assert (later["status"], later["why"]) == (FAILED, "0.701 s to the first result, compiled before: must be under 0.5")
    Process(monkeypatch, compiling, compiling | {"objects": ["sonicmoe.kernels.up_projection__y"]}, *[{"first_ms": 1.0}] * 2)
    assert run.run_item(item)[0]["why"] == "RuntimeError: a later process compiled again"
    Process(monkeypatch, {"first_ms": 1.0})
    assert "did not compile sonicmoe.kernels.up_projection" in run.run_item(item)[0]["why"]


def test_where_there_is_no_compiler_a_compiling_start_is_not_run(monkeypatch):
    monkeypatch.setattr(start, "compiler_version", lambda: None)
    item = next(item for item in start.items(FULL) if item.name == "start/compiled")
    assert run.run_item(item) == [
        {"name": "start/compiled", "mode": "compiled", "status": NOT_RUN, "passed": None, "why": "nvidia-cutlass-dsl is not installed"}
    ]


@pytest.mark.parametrize("kernel", [kernel for kernel in kernels.KERNELS if kernel.tiles], ids=lambda kernel: kernel.name)
def test_each_tile_is_the_one_that_runs(monkeypatch, kernel):
    """Asked of the host halves, with kernels that do nothing: also where a tile is chosen once for a shape."""
    loaded, data = [], kernels.Data(TINY, QUICK)
    data.operations = hopper

    def load(variant):
        return lambda *_: loaded.append(variant.params.get("tile"))

    for place, name, value in (
        (cute_runtime, "load", load),
        (cute_runtime, "on_device", lambda device: contextlib.nullcontext()),
        *((module, "is_supported_device", lambda device: True) for module in (cute_runtime, checks)),
        (torch.cuda, "get_device_properties", lambda device: h100_properties()),
    ):
        monkeypatch.setattr(place, name, value)
    launches = (hopper._up_launch, hopper._down_launch, hopper_backward._kernel, kernels._choices)
    caches = (chunk_counts.multiprocessors, arguments.fast_memory, *launches)
    for cache in caches:
        cache.cache_clear()
    for tile in (None, *kernel.tiles, None):
        with kernels.using(kernel, tile):
            kernel.run(data)
    for cache in caches:
        cache.cache_clear()
    rule, *tiles, again = [name for name in loaded if name is not None]
    assert tiles == [tile.name for tile in kernel.tiles]
    assert rule == again


def test_host_time_has_its_parts(monkeypatch):
    """With kernels of PyTorch in place of the GPU's; what is left for the conditions is no measurement of its own."""
    stand_ins = standing_in(monkeypatch)
    launched = next(stand_ins).launched
    _, layer = QUICK.problem(TINY)
    layer.backend = "hopper"
    x = torch.randn(TINY.T, TINY.H).bfloat16()
    parts = host_time.parts(layer, x)
    assert list(parts) == ["allocations", "launches", "launch"]
    launched.clear()
    with torch.no_grad():
        layer(x)
        whole = launched.copy()
        launched.clear()
        for part in parts.values():
            part()
    assert launched == [*whole, "gather_sum"]
    assert next(stand_ins, None) is None


def test_decode_steps_have_rows_of_their_own_and_one_layers_weights():
    steps = decode.make_steps(TINY._replace(T=2), QUICK)
    assert len(steps) == 8
    assert len({data.w_up.data_ptr() for data in steps} | {data.w_down.data_ptr() for data in steps}) == 2
    assert len({tuple(data.plan.row_to_slot.tolist()) for data in steps}) > 1
    assert not any(torch.equal(steps[0].x, data.x) for data in steps[1:])


@pytest.mark.parametrize("kernel", decode.PROJECTIONS, ids=lambda kernel: kernel.name)
def test_decode_is_timed_beside_the_floor_of_the_experts_with_rows(kernel):
    thiek = TINY._replace(T=2, E=64)
    cells = decode.measure(kernel, thiek, decode.make_steps, kernel.tiles[-2:], QUICK, "tiles/decode/it")
    assert [one["name"] for one in cells] == [f"tiles/decode/it/{tile.name}" for tile in kernel.tiles[-2:]]
    for one in cells:
        assert one["status"] == PASSED
        assert 1 <= one["experts_with_rows"] <= thiek.rows
        assert one["floor_share"] == one["floor_ms"] / one["ms"] > 0


def test_full_sizes_are_those_of_the_issues():
    names = {item.name for name in registry.SUITES for item in registry.load(name).items(FULL)}
    assert {f"dispatch/count_cumsum/{slots}-{experts}-{dtype}/{how}" for slots in (262144, 2097152) for experts in (128, 50000)
            for dtype in ("int32", "int64") for how in ("eager", "graph")} <= names  # fmt: skip
    assert {"memory/peak/24576-1536-256-128-8", "memory/peak/32768-4096-256-256-16"} <= names
    assert len([name for name in names if name.startswith("memory/saved-by-layer")]) == 5
    assert {f"dispatch/router-logits/{sizes}" for sizes in ("32768-4096-128", "24576-1536-128", "1-4096-8", "512-7168-256")} <= names
    decoded = [name.split("/")[3] for name in names if name.startswith("tiles/decode/")]
    assert len(decoded) == 2 * 9
    assert {"1-4096-14336-8-2", "8-2048-768-128-8", "64-2880-2880-32-4"} <= set(decoded)


def test_limits_of_memory_leave_room_for_what_a_step_must_keep():
    """The sums of docs/kernels/layer.md in bfloat16; sonicmoe's test_saved.py holds a layer to the same bytes a row."""

    def kept(thiek):
        return thiek.rows * 2 * thiek.I * 2 + 8 * thiek.rows + 4 * dispatch.packed_size(thiek.rows, thiek.T, thiek.E, thiek.K)

    for thiek, limit in memory.SAVED_MIB.items():
        assert kept(thiek) + memory.ROUNDED_UP_BYTES < (limit - 0.4) * 2**20
    for thiek, limit in memory.PEAK_MIB.items():
        gradients = 2 * (thiek.E * 3 * thiek.I * thiek.H + (thiek.rows + thiek.T) * thiek.H) + 4 * thiek.rows
        assert kept(thiek) + 2 * thiek.T * thiek.H + gradients + memory.ROUNDED_UP_BYTES < (limit - 1) * 2**20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "--device", "cpu"], "device='cpu': full sizes need a GPU, on a CPU there must be --quick"),
        (["step", "--device", "cpu", "--quick", "--out", "/dev/null/x/y"], "out='/dev/null/x/y': cannot be written: Not a directory"),
        (["step", "--device", "cpu", "--quick", "--out", "/"], "out='/': must be a file, not a folder"),
        (["step", "--device", "tpu"], "device='tpu': must be auto, cpu, cuda or cuda:N"),
        (["step", "--device", "cpu", "--quick", "--items", "x"], "items='x': matches none of the 8 items, such as step/compiled/top_k"),
    ],
)
def test_input_that_cannot_be_used_is_refused_in_one_line(capsys, arguments, words):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def test_an_item_without_a_gpu_says_what_it_needs():
    assert run.run_item(Item("a/b", lambda: [], "needs x"))[0]["why"] == "needs x"


def gpu_kernels():
    """What the suite of all tiles loads, for `build_defs.gpu_kernels`; the others take prebuilt ones."""
    return kernels.tile_variants()


@pytest.mark.gpu
@pytest.mark.parametrize("suite", registry.SUITES)
def test_a_suite_runs_on_the_gpu(tmp_path, suite):
    out = tmp_path / "result.json"
    status = main([suite, "--quick", "--device", str(devices.choose("cuda")), "--out", str(out)])
    cells = json.loads(out.read_text())["cells"]
    assert status == 0, [cell["why"] for cell in cells if cell["status"] == FAILED]
    missing = {cell["why"] for cell in cells if cell["status"] == NOT_RUN and not cell["name"].startswith("start/")}
    assert missing <= {"compute-sanitizer is not on PATH"}
