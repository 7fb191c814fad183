"""A recorded trace's tables, on synthetic traces whose answers are known, and on real ones where testing/data has them."""

import subprocess
import sys

import pytest

from sonicmoe.profiling import analysis, gaps, intervals, kernels, memory, trace, trim, work
from sonicmoe.profiling.work import Peaks, Work
from sonicmoe.tests.synthetic_trace import AUTOGRAD, GATHER_SUM, LOADER, UP, SyntheticTrace, training

RATES = {"flops_per_s": 700e12, "bytes_per_s": 3e12, "pinned_bytes_per_s": 50e9, "source": "this test"}


def analysed(made: SyntheticTrace, **options):
    made.metadata.setdefault("peaks", RATES)
    return analysis.analyse(trace.parse(made.content), **options)


def only_gap(made: SyntheticTrace):
    (gap,) = analysed(made).gaps
    return gap


def test_union_joins_what_touches_and_overlaps():
    assert intervals.union([(3, 5), (0, 2), (1, 3), (7, 7), (9, 10)]) == [(0, 5), (9, 10)]
    assert intervals.uncovered((1, 9.5), [(0, 5), (6, 7), (9, 10)]) == 1 + 2
    assert intervals.uncovered((5, 6), [(0, 5), (6, 7)]) == 1


def test_reading_a_trace_needs_no_torch():
    names = "analysis, gaps, html, kernels, memory, nsys, steady, tables, timeline, trace, trim, work"
    code = f"import sys; from sonicmoe.profiling import {names}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_steady_state_holds_whole_steps_and_the_last_one_only_closes_it():
    profile = analysed(training(4, gap=20.0))
    assert (profile.steady.duration, profile.steady.steps, profile.step_us) == (3000, 3, 1000)
    assert profile.busy[0].share == pytest.approx(0.98)
    assert profile.busy[0].kernel_share == pytest.approx(0.88)
    assert profile.kernel_us == 3 * 880
    skipped = analysed(training(4), skip=1)
    assert (skipped.steady.steps, skipped.steady.first_step) == (2, 4)
    with pytest.raises(ValueError, match="skip=1: must be 0 for a trace that marks no steps"):
        analysed(unmarked(), skip=1)
    with pytest.raises(ValueError, match="skip=4: must be below the 4 marked steps"):
        analysed(training(4), skip=4)


def test_a_prefetched_copy_does_not_move_the_begin_of_a_step():
    made = training(3)
    made.copy("HtoD", 50_000_000, 320, 900, stream=20, pinned=True, launched=310, thread=LOADER)
    profile = analysed(made)
    assert profile.steady.duration == 2000
    assert profile.busy[0].overlap_us == 720
    assert profile.busy[0].share == 1


def unmarked() -> SyntheticTrace:
    made = SyntheticTrace()
    made.kernel("a", 100, 30)
    made.kernel("b", 150, 50)
    return made


def test_without_marked_steps_the_whole_recording_counts():
    profile = analysed(unmarked())
    assert (profile.steady.duration, profile.steady.steps, profile.step_us) == (100, None, None)
    assert profile.busy[0].share == pytest.approx(0.8)


def test_kernels_have_count_share_rate_and_share_of_their_floor():
    product, total = analysed(training(3)).kernels
    assert (product.name, product.operation, product.count, product.total_us) == (
        "GroupedGemm", "up_projection", 2, 1200,
    )  # fmt: skip
    assert product.share == pytest.approx(2 / 3)
    assert product.rate.tflops == pytest.approx(700)
    assert product.rate.of_floor == pytest.approx(1)
    assert (total.operation, total.rate.tflops) == ("gather_sum", None)
    assert total.rate.gb_per_s == pytest.approx(2000)
    assert total.rate.of_floor == pytest.approx(2 / 3)


def test_work_of_a_call_with_two_kernels_is_the_operations_and_neither_kernels():
    made = SyntheticTrace()
    made.annotation("sonicmoe::dx_rows flops=70000000000 bytes=0", 0, 100)
    made.kernel("first", 200, 60, launched=10)
    made.kernel("second", 260, 40, launched=30)
    made.kernel("stranger", 300, 40, launched=150)
    profile = analysed(made)
    assert [row.rate for row in profile.kernels] == [None, None, None]
    (row,) = profile.operations
    assert (row.name, row.calls, row.gpu_us, row.rate.tflops, row.rate.of_floor) == (
        "dx_rows",
        1,
        100,
        pytest.approx(700),
        pytest.approx(1),
    )


def test_matrix_products_have_their_work_from_recorded_shapes():
    made = SyntheticTrace()
    made.operator("aten::bmm", 0, 50, dims=[[8, 100, 64], [8, 64, 32]], types=["c10::BFloat16", "c10::BFloat16"])
    made.kernel("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", 100, 10, launched=10)
    (row,) = analysed(made).kernels
    floor = 2 * 8 * (100 * 64 + 64 * 32 + 100 * 32) / 3e12
    assert row.rate.of_floor == pytest.approx(max(floor, 2 * 8 * 100 * 64 * 32 / 700e12) / 10e-6)
    assert work.of_operator("aten::mm", {"Input Dims": [[3, 4], [5, 6]], "Input type": ["float", "float"]}) is None
    assert work.of_operator("aten::add", {"Input Dims": [[3], [3]], "Input type": ["float", "float"]}) is None


def test_routing_kernels_have_their_work_from_shapes_and_k():
    """The formulas of docs/kernels/top_k.md at T,E,K = 100,64,4 in float32."""
    made = SyntheticTrace()
    types = ["float", "", "Scalar"]
    made.operator("sonicmoe_routing::top_k", 0, 50, dims=[[100, 64], [], []], types=types, scalars=["", "", "4"])
    made.kernel("kernel_cutlass__top_k_kernel_tensorptr_0", 100, 10, launched=10)
    made.operator("sonicmoe_routing::slot_scores_grad", 200, 50, dims=[[100, 64], [400], []], types=["float", "int", ""])
    made.kernel("kernel_cutlass__grad_kernel_tensorptr_0", 300, 20, launched=210)
    for content in (made.content, trim.trim(made.content)):
        gradient, forward = analysis.analyse(trace.parse(content)).kernels
        assert forward.rate.gb_per_s == pytest.approx((100 * 64 * 4 + 12 * 400) / 10e-6 / 1e9)
        assert gradient.rate.gb_per_s == pytest.approx((2 * 100 * 64 * 4 + 8 * 400) / 20e-6 / 1e9)


def test_the_routers_product_has_its_work_from_shapes():
    """The bytes of docs/kernels/router_logits.md at T,H,E = 100,64,8."""
    details = {"Input Dims": [[100, 64], [8, 64]], "Input type": ["c10::BFloat16", "c10::BFloat16"]}
    assert work.of_operator("sonicmoe::router_logits", details) == Work(2 * 100 * 64 * 8, 2 * 64 * (100 + 8) + 4 * 100 * 8)


def test_work_survives_the_name_of_a_range():
    name = work.range_name("gather_sum", Work(0, 12345))
    assert work.read_range(name) == ("gather_sum", Work(0, 12345))
    assert work.read_range(work.range_name("plan", None)) == ("plan", None)
    assert work.read_range("sonicmoe line a.py:3 f") is None
    assert Peaks(1e12, 1e9, 1e9, "").floor_s(Work(2 * 10**12, 10**9)) == 2


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>(int, float)", "vectorized_elementwise_kernel"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 1>(float*)", "CatArrayBatchedCopy"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "nvjet_tst_128x256_64x4_2x1_v_bz_TNT"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn_align8>(Params)",
            "cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn_align8",
        ),
        (UP, "GroupedGemm"),
        (GATHER_SUM, "gather_sum_kernel"),
    ],
)
def test_kernels_are_shown_by_short_names(name, short):
    assert kernels.short_name(name) == short


def test_memory_operations_by_kind():
    made = SyntheticTrace()
    for index, size in enumerate((1_000_000, 2_000_000, 6_000_000)):
        made.copy("DtoD", size, 100.0 * index + 100, 10)
    made.copy("HtoD", 4_000_000, 500, 100)
    made.copy("HtoD", 4_000_000, 700, 80, pinned=True)
    made.copy("DtoH", 8, 800, 2)
    made.memset(512, 900, 1)
    rows = {row.kind: row for row in analysed(made).memory}
    assert list(rows) == ["HtoD pageable", "HtoD pinned", "DtoD", "DtoH pageable", "memset"]
    row = rows["DtoD"]
    assert (row.count, row.total_mb, row.mean_mb, row.median_mb, row.min_mb, row.max_mb, row.total_us) == (3, 9, 3, 2, 1, 6, 30)
    assert row.deviation_mb == pytest.approx(7**0.5)
    assert row.gb_per_s == pytest.approx(300)
    assert rows["memset"].deviation_mb == 0


def test_pageable_copy_has_its_line_its_size_and_what_pinning_saves():
    made = SyntheticTrace()
    made.annotation("sonicmoe line train.py:12 fetch", 80, 130)
    made.operator("aten::copy_", 90, 115)
    made.copy("HtoD", 1_000_000, 100, 100, launched=92)
    made.copy("HtoD", 2_000_000, 300, 50, pinned=True, launched=280)
    profile = analysed(made)
    (one,) = profile.pageable
    assert (one.bytes, one.duration_us, one.host_us, one.where, one.operator) == (1_000_000, 100, 110, "train.py:12 fetch", "aten::copy_")
    assert profile.pinned_rate[0] == pytest.approx(40e9)
    assert one.saved_us == pytest.approx(100 - 25)


def test_rate_of_pinned_copies_is_the_machines_where_the_trace_has_none_of_size():
    made = SyntheticTrace()
    made.copy("HtoD", 1000, 300, 50, pinned=True)
    assert analysed(made).pinned_rate == (50e9, "this test")
    assert analysis.analyse(trace.parse(SyntheticTrace().content)).pinned_rate[0] == work.H100.pinned_bytes_per_s


def test_line_comes_from_python_functions_or_call_stacks_where_no_line_was_recorded():
    made = SyntheticTrace()
    made.function("train.py(10): fetch", 70, 200)
    made.function("torch/_tensor.py(5): cuda", 75, 190)
    made.function("<built-in method to of Tensor object at 0x7f48a508ac60>", 80, 150)
    made.copy("HtoD", 1000, 100, 100, launched=92)
    made.operator("aten::to", 290, 250, stack="<built-in method to of Tensor>;data/load.py(4): pad;train.py(13): step;")
    made.copy("HtoD", 2000, 320, 100, launched=300)
    made.copy("HtoD", 3000, 720, 100, launched=700)
    assert [one.where for one in analysed(made).pageable] == ["train.py fetch (from line 10)", "data/load.py pad (from line 4)", ""]


def test_lines_found_in_a_second_recording_belong_to_the_copies_in_their_order():
    made = SyntheticTrace()
    for step in range(3):
        for index, size in enumerate((4096, 4096, 100)):
            made.copy("HtoD", size, 1000.0 * step + 100 * index + 50, 20, launched=1000.0 * step + 100 * index + 40)
    made.steps(0, 1000, 2000, end=3000)
    made.metadata["copy_lines"] = [[4096, "a.py:1 f"], [4096, "a.py:2 f"], [100, "a.py:3 f"]]
    assert [one.where for one in analysed(made).pageable] == ["a.py:1 f", "a.py:2 f", "a.py:3 f"] * 2
    made.metadata["copy_lines"] = [[4096, "a.py:1 f"], [100, "a.py:3 f"], [4096, "a.py:2 f"]]
    assert [one.where for one in analysed(made).pageable] == ["", "", "a.py:3 f"] * 2


def test_gap_behind_a_synchronisation_is_the_synchronisations():
    made = SyntheticTrace()
    made.kernel("a", 100, 200, launched=50)
    made.operator("aten::item", 60, 250)
    made.operator("aten::_local_scalar_dense", 62, 246)
    made.call("cudaStreamSynchronize", 70, 235)
    made.kernel("b", 345, 50, launched=335)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.operator) == (gaps.HOST_WAITS, "cudaStreamSynchronize", "aten::_local_scalar_dense")
    assert (gap.begin_us, gap.duration_us, gap.idle_us, gap.before, gap.after) == (250, 45, 45, "a", "b")


def test_a_call_that_waits_is_no_cause_once_it_was_over_before_the_stream_ran_empty():
    made = SyntheticTrace()
    made.kernel("a", 100, 200, launched=50)
    made.call("cudaMalloc", 90, 60)
    made.kernel("b", 405, 50, launched=395)
    assert (only_gap(made).kind, only_gap(made).call) == (gaps.HOST_WORKS, "Python outside of PyTorch's operators")


def test_gap_behind_a_pageable_copy_is_the_copys():
    made = SyntheticTrace()
    made.kernel("a", 100, 50, launched=50)
    made.copy("HtoD", 10_000_000, 152, 400, launched=70)
    made.kernel("b", 600, 50, launched=590)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.duration_us) == (gaps.HOST_WAITS, "cudaMemcpyAsync", 48)


def test_gap_while_the_host_is_late_is_what_took_its_time():
    made = SyntheticTrace()
    made.kernel("a", 100, 50, launched=90)
    made.operator("aten::sort", 160, 130, stack="x.py(3): pick;")
    made.operator("aten::empty", 170, 20)
    made.call("cudaMalloc", 200, 70)
    made.kernel("b", 300, 50, launched=280)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.operator, gap.where) == (gaps.HOST_WORKS, "cudaMalloc", "aten::sort", "x.py pick (from line 3)")


def test_gap_in_which_no_operator_runs_is_pythons():
    made = SyntheticTrace()
    made.steps(0, end=1000)
    made.kernel("a", 100, 50, launched=90)
    made.operator("aten::add", 595, 10)
    made.kernel("b", 610, 50, launched=600)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.operator) == (gaps.HOST_WORKS, "Python outside of PyTorch's operators", "")


def test_work_handed_to_another_thread_is_looked_for_in_the_one_that_hands_it():
    made = SyntheticTrace()
    made.kernel("a", 100, 50, launched=90)
    made.operator("aten::cat", 155, 300)
    made.operator("MulBackward0", 465, 20, thread=AUTOGRAD)
    made.kernel("b", 490, 50, launched=470, thread=AUTOGRAD)
    assert only_gap(made).call == "aten::cat"


def test_gap_on_a_stream_that_waits_for_another_names_it():
    made = SyntheticTrace()
    made.kernel("a", 100, 50, launched=20)
    made.copy("HtoD", 1000, 120, 280, stream=20, pinned=True, launched=30)
    made.kernel("b", 402, 50, launched=40)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.duration_us, gap.idle_us) == (gaps.OTHER_STREAM, "stream 20: Memcpy HtoD", 252, 2)


def test_gap_behind_a_launch_that_was_there_in_time_is_the_launchs():
    made = SyntheticTrace()
    made.operator("aten::mm", 15, 20)
    made.kernel("b", 158, 50, launched=20)
    made.kernel("a", 100, 50, launched=10)
    gap = only_gap(made)
    assert (gap.kind, gap.call, gap.operator) == (gaps.LAUNCH, "cudaLaunchKernel", "aten::mm")


@pytest.mark.parametrize(("lasting", "kind"), [(4, gaps.EVENT), (100, gaps.LAUNCH)])
def test_long_gap_behind_a_launch_in_time_is_an_events_unless_the_call_lasted(lasting, kind):
    made = SyntheticTrace()
    made.kernel("a", 100, 50, launched=10)
    made.kernel("b", 250, 50, launched=120, lasting=lasting)
    assert only_gap(made).kind == kind


def test_gaps_within_a_cuda_graph_and_without_launches_are_called_so():
    made = SyntheticTrace()
    graph = made.call("cudaGraphLaunch", 50, 20)
    made.kernel("a", 100, 50, correlation=graph)
    made.kernel("b", 160, 50, correlation=graph)
    made.kernel("c", 260, 50, launched=None)
    assert [gap.kind for gap in analysed(made).gaps] == [gaps.GRAPH, gaps.UNKNOWN]


def test_only_gaps_above_the_threshold_within_the_steady_state_are_listed_by_cause():
    made = training(4, gap=20.0)
    rows = analysed(made).gap_causes
    assert [(row.kind, row.count, row.total_us, row.longest_us) for row in rows] == [(gaps.LAUNCH, 3, 60, 20)]
    assert analysed(made, gap_us=20.5).gaps == []


def test_trace_without_a_gpu_gives_the_hosts_tables_and_says_what_is_missing():
    made = SyntheticTrace()
    made.annotation("sonicmoe::up_projection flops=2000000 bytes=100", 0, 10)
    made.operator("aten::mm", 2, 6)
    made.steps(0, 20, end=50)
    profile = analysed(made)
    assert (profile.steady, profile.step_us, profile.needs_gpu) == (None, 25, analysis.GPU_TABLES)
    assert [(row.name, row.calls, row.host_us, row.rate.tflops) for row in profile.operations] == [
        ("up_projection", 1, 10, pytest.approx(0.2))
    ]
    own = {row.name: row.own_us for row in profile.host}
    assert own == {"sonicmoe::up_projection": 4, "aten::mm": 6, "the step's Python": 40}


def test_traces_in_the_older_categories_are_read():
    made = training(3)
    content = made.content
    names = {"kernel": "Kernel", "gpu_memset": "Memset", "cuda_runtime": "Runtime", "cpu_op": "Operator"}
    for event in content["traceEvents"]:
        event["cat"] = names.get(event.get("cat"), event.get("cat"))
    assert analysis.analyse(trace.parse(content)).busy == analysis.analyse(trace.parse(made.content)).busy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"\x1f\x8bnot gzip", "is not JSON|cannot be read"),
        (b'{"events": []}', "has no traceEvents: must be a Chrome trace"),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k"}]}', "has an event that cannot be read: KeyError 'ts'"),
    ],
)
def test_file_that_is_no_trace_is_refused_in_one_sentence(tmp_path, data, message):
    path = tmp_path / "t.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"trace='.*t.json': ({message})") as caught:
        trace.read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        trace.read(tmp_path / "none.json")


def mixed() -> SyntheticTrace:
    """Training steps with a copy by the main thread, found by Python's functions, and one by a loader's, found by its line."""
    made = training(3, gap=20.0)
    made.function("/home/somebody/work/train.py(10): fetch", 390, 1300)
    made.function("/home/somebody/work/train.py(30): idle", 376, 5)
    made.operator("aten::copy_", 395, 1290)
    made.copy("HtoD", 1_000_000, 1500.5, 90, stream=20, launched=400)
    made.annotation("sonicmoe line /srv/x/load.py:3 pad", 1300, 600, thread=LOADER)
    made.copy("HtoD", 2_000_000, 1700, 90, stream=20, launched=1310, thread=LOADER)
    made.annotation("sonicmoe line data/sets/mix.py:7 draw", 1950, 100, thread=LOADER)
    made.copy("HtoD", 3_000_000, 1970, 20, stream=20, launched=1960, thread=LOADER)
    return made


def test_trimmed_trace_gives_the_same_tables_and_no_names_of_the_machine(tmp_path):
    whole = mixed().content
    small = trim.trim(whole)
    path = tmp_path / "kept.json.gz"
    trace.write(path, small)
    text = str(trace.load(path))
    for name in ("somebody", "/srv", "build-17", "4242", "tmp7zrpq9m3", "ac2g", "idle'"):
        assert name not in text
    assert trim.trim(small)["traceEvents"] == small["traceEvents"]
    before, after = analysis.analyse(trace.parse(whole)), analysis.analyse(trace.read(path))
    assert [one.where for one in after.pageable] == ["train.py fetch (from line 10)", "load.py:3 pad", "data/sets/mix.py:7 draw"]
    assert len(before.pageable) == 3
    for name in ("kernels", "operations", "memory", "gap_causes", "host"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.busy[0].share == pytest.approx(before.busy[0].share, abs=1e-9)


def test_memory_kinds_of_names_that_are_not_copies():
    one = trace.GpuActivity("memcpy", "Memcpy PtoP (Device -> Device)", 0, 1, 0, 7, None, 8)
    assert memory.kind_of(one) == "PtoP"
