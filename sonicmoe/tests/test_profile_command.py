"""`sonicmoe profile`: recordings made here on the CPU, scripts, the page, nsys; and recordings on a GPU."""

import gzip
import json
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from routing import RouterConfig
from sonicmoe import cases, cli
from sonicmoe.profiling import analysis, annotate, html, lines, memory, nsys, record, trace, work
from sonicmoe.tests.profile_invariants import check_invariants
from sonicmoe.tests.synthetic_trace import SyntheticTrace, training
from sonicmoe.thiek import Thiek

THIEK = "64,32,16,8,2"
QUICK = ["--device", "cpu", "--warmup", "1", "--steps", "2"]
OPERATIONS = {"up_projection", "down_projection", "gather_sum", "activation_backward", "down_weight_grad", "up_weight_grad", "dx_rows"}


def profile_json(capsys, tmp_path, *argv):
    code = cli.main(["profile", *argv, "--out", str(tmp_path / "out"), "--json"])
    result = json.loads(capsys.readouterr().out)
    (cell,) = result["cells"]
    return code, result, cell


def test_layers_steps_are_recorded_with_operations_and_host_time(capsys, tmp_path):
    code, result, cell = profile_json(capsys, tmp_path, "--thiek", THIEK, "--seed", "1", *QUICK)
    assert code == 0
    assert {"device", "driver", "power_limit_w", "versions", "commit", "dirty", "date", "command"} <= result.keys()
    assert (cell["thiek"], cell["mode"], cell["routing"]) == ([64, 32, 16, 8, 2], "forward+backward", "top_k")
    assert cell["needs_gpu"] == list(analysis.GPU_TABLES)
    calls = {row["name"]: row["calls"] for row in cell["operations"]}
    assert calls == {**dict.fromkeys(OPERATIONS, 3), "gather_sum": 6}
    assert cell["step_us"] > 0
    own = {row["name"]: row["own_us"] for row in cell["host"]}
    assert own["aten::mm"] > 0
    kept = trace.read(tmp_path / "out" / "trace.json.gz")
    assert len(kept.steps) == 3
    assert sum(own.values()) <= 1.01 * sum(step.end - step.begin for step in kept.steps)


def test_table_in_the_terminal_says_which_tables_need_a_gpu(capsys, tmp_path):
    argv = ["--thiek", THIEK, "--mode", "inference", *QUICK, "--out", str(tmp_path)]
    assert cli.main(["profile", *argv]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not there without a GPU: GPU busy share, kernels, memory operations, gaps, pageable copies." in printed
    assert "up_projection" in printed
    assert "dx_rows" not in printed


def test_trace_from_elsewhere_is_analysed_and_kept_trimmed(capsys, tmp_path):
    made = training(3)
    trace.write(tmp_path / "t.json", made.content)
    kept = tmp_path / "kept.json.gz"
    code, _, cell = profile_json(capsys, tmp_path, "--trace", str(tmp_path / "t.json"), "--keep-trace", str(kept), "--trim")
    assert code == 0
    assert cell["busy"] == [{"device": 0, "share": 1, "kernel_share": pytest.approx(0.9), "overlap_us": pytest.approx(0, abs=1e-6)}]
    assert "host_name" not in json.loads(gzip.decompress(kept.read_bytes()))
    assert profile_json(capsys, tmp_path, "--trace", str(kept))[2] == {**cell, "name": "kept.json.gz"}


def test_busy_share_below_the_least_fails_and_names_the_gap(capsys, tmp_path):
    trace.write(tmp_path / "t.json", training(3, gap=20.0).content)
    argv = ["profile", "--trace", str(tmp_path / "t.json"), "--out", str(tmp_path), "--min-busy"]
    assert cli.main([*argv, "0.98"]) == 0
    printed = capsys.readouterr().out
    for part in ("GPU busy 98.00%", "Kernels by time", "GroupedGemm", "up_projection", "Gaps by cause", "cudaMemsetAsync"):
        assert part in printed
    assert cli.main([*argv, "0.984"]) == 1
    said = capsys.readouterr().err
    assert said == "GPU busy 98.00%, at least 98.40% is asked for; most of it: launch, cudaMemsetAsync in aten::zero_, 40.0 us\n"


STEP = """
import torch
assert __name__ != "__main__"
calls = []
def step():
    calls.append(torch.ones(3).sin())
"""
TRAIN = """
import sys
import torch
from sonicmoe import MoE

def main(steps):
    layer = MoE(16, 8, 4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(steps):
        layer(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("ran to its end")

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""


def test_script_with_a_step_function_is_called_as_often_as_needed(capsys, tmp_path):
    (tmp_path / "s.py").write_text(STEP)
    code, _, cell = profile_json(capsys, tmp_path, "--script", str(tmp_path / "s.py"), *QUICK)
    assert code == 0
    assert {row["name"]: row["count"] for row in cell["host"]}["aten::sin"] == 3


def test_training_script_is_left_after_the_optimizer_steps_that_are_needed(capsys, tmp_path):
    (tmp_path / "t.py").write_text(TRAIN)
    code = cli.main(["profile", "--script", str(tmp_path / "t.py"), "--script-args", "50", *QUICK, "--out", str(tmp_path / "out")])
    assert code == 0
    printed = capsys.readouterr().out
    assert "ran to its end" not in printed
    assert "up_weight_grad" in printed
    assert len(trace.read(tmp_path / "out" / "trace.json.gz").steps) == 3
    assert cli.main(["profile", "--script", str(tmp_path / "t.py"), "--script-args", "3", *QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "ended after 3 optimizer steps: must define step(), or make 6 steps of an optimizer" in capsys.readouterr().err


def test_error_of_a_script_is_shown_with_its_own_traceback(tmp_path):
    for name, source in (("s.py", "def step():\n    int('x')\n"), ("t.py", "int('x')\n")):
        (tmp_path / name).write_text(source)
        with pytest.raises(RuntimeError, match=f"{name} raised ValueError: invalid literal") as caught:
            cli.main(["profile", "--script", str(tmp_path / name), *QUICK, "--out", str(tmp_path)])
        assert isinstance(caught.value.__cause__, ValueError)
    (tmp_path / "e.py").write_text("import sys; sys.exit(0)\n")
    assert cli.main(["profile", "--script", str(tmp_path / "e.py"), *QUICK, "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none of them: must be exactly one of --thiek, --script, --trace"),
        (["--thiek", THIEK, "--script", "a.py"], "--thiek and --script: must be exactly one of"),
        (["--thiek", "0,8,8,4,2"], "T=0: must be at least 1 to be profiled"),
        (["--thiek", THIEK, "--steps", "0"], "steps=0: must be at least 1"),
        (["--thiek", THIEK, "--skip", "1"], "skip=1: must come with --trace"),
        (["--script", "a.py", "--mode", "inference"], "mode=inference: must come with --thiek"),
        (["--trace", "a.json", "--dtype", "fp16"], "dtype=fp16: must come with --thiek"),
        (["--trace", "a.json", "--steps", "9"], "steps=9: must come with --thiek or --script"),
        (["--thiek", THIEK, "--script-args", "1"], "script_args=1: must come with --script"),
        (["--thiek", THIEK, "--trim"], "--trim: must come with --keep-trace"),
        (["--thiek", THIEK, "--min-busy", "98"], "min_busy=98.0: must be above 0 and at most 1"),
        (["--script", "no-such-script.py"], "script='no-such-script.py': cannot be read: No such file"),
        (["--trace", "no-such-trace.json"], "trace='no-such-trace.json': cannot be read: No such file"),
        (["--trace", "t", "--nsys", "r"], "--nsys: must come with --thiek or --script"),
        (["--thiek", THIEK, "--nsys", "r", "--json"], "--json: must come without --nsys"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, tmp_path, arguments, message):
    assert cli.main(["profile", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_lines_of_code_are_recorded_around_pytorchs_calls(tmp_path, monkeypatch):
    """The second recording, whose ranges `memory.where` reads; made here although no copy asks for it."""
    path = tmp_path / "caller.py"
    path.write_text("import torch\ndef fetch(x, layer):\n    y = x.to(torch.bfloat16)\n    return layer.to(torch.bfloat16)(y)\n")
    caller = {"__name__": "caller"}
    exec(compile(path.read_text(), str(path), "exec"), caller)
    seen = []
    monkeypatch.setattr(record, "lines_of_copies", lambda parsed: seen.append(parsed) or [(8, "x.py:1 f")])
    monkeypatch.setattr(record.Recorder, "_export", add_copy(record.Recorder._export))
    monkeypatch.chdir(tmp_path)
    calls = []
    recorder = record.Recorder(warmup=1, steps=1, on_gpu=False)
    content = recorder.run(lambda: calls.append(caller["fetch"](torch.ones(4), torch.nn.Linear(4, 4))))
    assert len(calls) == 1 + 2 + 2
    assert content["sonicmoe"]["copy_lines"] == [(8, "x.py:1 f")]
    (parsed,) = seen
    casts = [event for event in parsed.host_events() if event.name == "aten::_to_copy"]
    assert {memory.where(list(parsed.threads[event.thread].around(event.begin))) for event in casts} == {
        "caller.py:3 fetch",
        "caller.py:4 fetch",  # of the layer's parameters, within torch.nn
    }


def add_copy(export):
    """`Recorder._export` whose traces also hold one copy on a GPU."""
    made = SyntheticTrace()
    made.copy("HtoD", 8, 10, 1)

    def changed(self, profiler):
        export(self, profiler)
        self._recorded["traceEvents"] += [event for event in made.events if event.get("cat") == "gpu_memcpy"]

    return changed


def test_line_marks_leave_compiled_functions_whole():
    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x.sin() + 1

    with lines.LineMarks():
        assert torch.equal(function(torch.zeros(2)), torch.ones(2))


def test_work_of_each_operation_by_hand():
    """T,H,I,E,K = 10,16,8,4,2 in bfloat16: R = 20, Z = 16, weights 4 * 16 * 16 and 4 * 16 * 8."""
    case = cases.make_case(Thiek(10, 16, 8, 4, 2), seed=0, router=RouterConfig(k=2))
    layer = case.layer("reference")
    recorder = record.Recorder(warmup=1, steps=1, on_gpu=False)
    with annotate.annotated(on_gpu=False):
        content = recorder.run(lambda: cases.run(layer, case))
    found = {}
    for event in trace.parse(content).host_events():
        if known := work.read_range(event.name) if event.kind == "annotation" else None:
            found.setdefault(known[0], set()).add(known[1])
    x, a, z, y, w_up, w_down = 10 * 16, 20 * 8, 20 * 16, 20 * 16, 4 * 16 * 16, 4 * 16 * 8
    assert found == {
        "up_projection": {(2 * 20 * 16 * 16, 2 * (w_up + x + a + z))},
        "down_projection": {(2 * 20 * 16 * 8, 2 * (w_down + a + y))},
        "gather_sum": {(0, 2 * (y + x) + 4 * 20), (0, 2 * (y + x))},
        "activation_backward": {(2 * 20 * 16 * 8, 2 * (z + z + a + w_down + x))},
        "down_weight_grad": {(2 * 20 * 16 * 8, 2 * (x + a + w_down))},
        "up_weight_grad": {(2 * 20 * 16 * 16, 2 * (x + z + w_up))},
        "dx_rows": {(2 * 20 * 16 * 16, 2 * (w_up + z + y))},
    }


class Page(HTMLParser):
    """Tags, links to other files, and headings of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.headings, self.bars, self._heading = [], [], [], 0, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.bars += tag == "i"
        self._heading = tag in ("h1", "h2", "h3")

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._heading = False


def test_page_is_one_file_with_timeline_and_tables():
    made = training(3, gap=20.0)
    made.copy("HtoD", 1_000_000, 1500, 90, stream=20, launched=1400)
    parsed = trace.parse(made.content)
    text = html.page(parsed, analysis.analyse(parsed), title="A <b>", described="one\ntwo")
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "script" not in text
    assert page.headings[:2] == ["A <b>", "Timeline of one step"]
    assert page.headings[-5:] == [
        "The layer's operations", "Memory operations by kind", "Gaps by cause", "Pageable copies to the device", "The host by own time",
    ]  # fmt: skip
    for bar in ("left:0.000%;width:60.000%", "left:60.000%;width:28.000%", "left:90.000%;width:10.000%"):
        assert bar in text
    assert 'title="idle for 20.0 us"' in text


def test_narrow_bars_are_drawn_together():
    made = SyntheticTrace()
    for index in range(4_000):
        made.kernel("k", 10.0 * index, 9.0, launched=None)
    parsed = trace.parse(made.content)
    text = html.page(parsed, analysis.analyse(parsed, gap_us=1e9), title="", described="")
    assert Page(text).bars < 500


NSYS = """#!{python}
import json, os, sys
with open(os.environ["NSYS_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(int(os.environ.get("NSYS_EXIT", "0")))
"""


def run_nsys(monkeypatch, tmp_path, path):
    argv = ["profile", "--thiek", THIEK, "--steps", "2", "--nsys", str(tmp_path / "r" / "layer")]
    monkeypatch.setattr(sys, "argv", ["sonicmoe", *argv])
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("NSYS_LOG", str(tmp_path / "log"))
    return cli.main(argv)


def test_nsys_records_the_same_command_and_prints_its_summaries(monkeypatch, tmp_path, capsys):
    program = tmp_path / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(NSYS.format(python=sys.executable))
    program.chmod(0o755)
    assert run_nsys(monkeypatch, tmp_path, program.parent) == 0
    recorded, summary = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert recorded[0] == "profile"
    assert {"--capture-range=cudaProfilerApi", f"--output={tmp_path}/r/layer"} <= set(recorded)
    inner = recorded[recorded.index("sonicmoe") :]
    assert inner[:6] == ["sonicmoe", "profile", "--thiek", THIEK, "--steps", "2"]
    assert inner[-1] == "--inside-nsys"
    assert (summary[0], summary[-1]) == ("stats", f"{tmp_path}/r/layer.nsys-rep")
    assert [line.split()[:2] for line in capsys.readouterr().err.splitlines()] == [["nsys", "profile"], ["nsys", "stats"]]
    monkeypatch.setenv("NSYS_EXIT", "3")
    assert run_nsys(monkeypatch, tmp_path, program.parent) == 3


def test_nsys_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path, capsys):
    assert run_nsys(monkeypatch, tmp_path, tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith("sonicmoe profile: nsys=")
    assert "is not on PATH: install NVIDIA Nsight Systems" in said
    assert len(said.splitlines()) == 1


def test_capture_range_holds_the_steps_after_the_warmup(monkeypatch):
    said = []
    for module, name in ((torch.cuda, "synchronize"), (torch.cuda.profiler, "start"), (torch.cuda.profiler, "stop")):
        monkeypatch.setattr(module, name, lambda name=name: said.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", torch.no_grad)
    nsys.CaptureRange(warmup=2, steps=2).run(lambda: said.append("run"))
    assert said == ["run", "run", "synchronize", "start", "step 0", "run", "pop", "step 1", "run", "pop", "synchronize", "stop"]


LOADING = """
import torch
source = torch.randn(1 << 22)
pinned = source.pin_memory()
layer = torch.nn.Linear(2048, 2048, device="cuda")

def step():
    x = source.to("cuda")
    y = pinned.to("cuda", non_blocking=True)
    layer((x + y).view(-1, 2048)).square().sum().backward()
"""


@pytest.mark.gpu
def test_gpu_recording_finds_the_pageable_copy_with_its_line(capsys, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(textwrap.dedent(LOADING))
    assert profile_json(capsys, tmp_path, "--script", str(script), "--steps", "4")[0] == 0
    profile = analysis.analyse(trace.read(tmp_path / "out" / "trace.json.gz"))
    check_invariants(profile)
    assert profile.steady.steps == 4
    assert [(one.bytes, Path(one.where.split(":")[0]).name, one.where.split(":")[1]) for one in profile.pageable] == [
        (1 << 24, "load.py", "8 step")
    ] * 4
    assert all(one.host_us >= 0.5 * one.duration_us > 0 for one in profile.pageable)
    assert profile.pinned_rate[1].startswith("seen in ")
    kinds = {row.kind: row for row in profile.memory}
    assert (kinds["HtoD pageable"].count, kinds["HtoD pinned"].count) == (4, 4)
    assert kinds["HtoD pinned"].total_mb == pytest.approx(4 * (1 << 24) / 1e6)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inference", "forward+backward"])
def test_gpu_recording_of_a_layer_keeps_the_invariants(capsys, tmp_path, mode):
    kept = tmp_path / "kept.json.gz"
    argv = ["--thiek", "4096,1024,512,16,4", "--mode", mode, "--keep-trace", str(kept), "--trim"]
    assert profile_json(capsys, tmp_path, *argv)[0] == 0
    whole = trace.read(tmp_path / "out" / "trace.json.gz")
    profile = analysis.analyse(whole)
    check_invariants(profile)
    (busy,) = profile.busy
    streams = {one.stream for one in whole.gpu if one.kind == "kernel"}
    if len(streams) == 1 and busy.overlap_us == 0:
        assert profile.kernel_us == pytest.approx(busy.kernel_share * profile.steady.duration, rel=1e-6)
    up = next(row for row in profile.operations if row.name == "up_projection")
    assert up.calls == 5
    assert up.rate.tflops is None or 10 < up.rate.tflops < 1200
    again = analysis.analyse(trace.read(kept))
    assert [(row.full_name, row.operation, row.count) for row in again.kernels] == [
        (row.full_name, row.operation, row.count) for row in profile.kernels
    ]
    assert again.busy[0].share == pytest.approx(busy.share, rel=1e-6)
