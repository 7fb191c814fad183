import functools
import json
import subprocess
import sys

import pytest
import torch

from sonicmoe import accuracy, benchmark, cli, devices, timing
from sonicmoe.commands import report

THIEK = "150,32,16,8,2"
TENSORS = {"o", "dx", "dw_up", "dw_down", "drouter"}
MODES = ["inference", "forward", "forward+backward", "backward"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One warm round and two timed ones."""
    measure = functools.partial(timing.measure, warmup_s=0, measure_s=0, min_repeats=2)
    monkeypatch.setattr(timing, "measure", lambda variants, *, device, **_: measure(variants, device=device))


def run_json(capsys, *argv):
    code = cli.main([*argv, "--json", "--device", "cpu"])
    return code, json.loads(capsys.readouterr().out)


def test_bench_reports_errors_and_times_of_every_mode(capsys):
    code, result = run_json(capsys, "bench", "--thiek", THIEK, "--bias", "--seed", "3")
    assert code == 0
    assert {"device", "driver", "power_limit_w", "versions", "commit", "dirty", "date", "command", "cells"} <= result.keys()
    judged, *timed = result["cells"]
    assert judged["passed"] is True
    assert judged["errors"].keys() == TENSORS | {"db_up", "db_down"} == judged["reference"].keys()
    assert all(0 < error["whole"] <= error["worst_block"] < 1e-2 for error in judged["errors"].values())
    assert [cell["mode"] for cell in timed] == MODES
    for cell in timed:
        assert cell["thiek"] == [150, 32, 16, 8, 2]
        assert cell["ms"] > 0
        assert cell["ratio"] == pytest.approx(cell["bound_ms"] / cell["ms"])
    forward = timed[1]
    assert forward["tflops"] == pytest.approx(6 * 300 * 32 * 16 / (forward["ms"] * 1e9))
    assert 300 * 32 * 2 / 2**20 < forward["saved_mib"] < 2 * 300 * 32 * 2 / 2**20


def test_trials_draw_fresh_inputs_and_count_rows(capsys, monkeypatch):
    drawn = []
    variants = benchmark.layer_variants
    monkeypatch.setattr(benchmark, "layer_variants", lambda layer, case: drawn.append(case.x[0].clone()) or variants(layer, case))
    code, result = run_json(capsys, "bench", "--thiek", THIEK, "--routing", "up", "--tile-m", "16", "--trials", "3", "--skip-test")
    assert code == 0
    assert [cell["mode"] for cell in result["cells"]] == MODES
    assert len({tuple(x.tolist()) for x in drawn}) == 3
    rows = result["cells"][0]["rows"]
    assert (rows["trials"], rows["wasted_ratio"]) == (3, 0)
    assert rows["processed_rows"] == rows["hardware_rows"] > 300


def test_hardware_rows_by_hand():
    rows = benchmark.Rows(4)
    rows.add(torch.tensor([4, 1, 0, 3]))
    rows.add(torch.tensor([4, 4, 0, 0]))
    assert rows.means() == {"tile_m": 4, "trials": 2, "processed_rows": 8, "hardware_rows": 10, "wasted_ratio": pytest.approx(1 / 6)}


def test_a_wrong_layer_fails_with_exit_code_1(capsys, monkeypatch):
    run = benchmark.cases.run

    def forget_an_expert(layer, case):
        result, routing = run(layer, case)
        result["dw_down"][3].zero_()
        return result, routing

    monkeypatch.setattr(benchmark.cases, "run", forget_an_expert)
    code, result = run_json(capsys, "bench", "--thiek", THIEK)
    assert code == 1
    assert result["cells"][0]["passed"] is False
    assert "dw_down worst_block 1.00e+00" in result["cells"][0]["why"]
    assert cli.main(["bench", "--thiek", THIEK, "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_tables_name_tensors_and_modes(capsys):
    assert cli.main(["bench", "--thiek", THIEK, "--device", "cpu", "--routing", "nearest", "--tile-m", "16"]) == 0
    printed = capsys.readouterr()
    for word in (*TENSORS, *MODES, "TFLOPS", "GEMM bound", "wasted ratio", "nearest, tile_m 16", "saved for backward"):
        assert word in printed.out
    assert printed.err == ""  # the progress bar is for terminals


def test_report_passes_and_says_that_it_is_scaled_down(capsys, monkeypatch):
    monkeypatch.setattr(report, "scaled_down", lambda sizes: sizes._replace(T=sizes.T // 64, H=64, I=32, E=sizes.E // 8))
    assert cli.main(["report", "--device", "cpu", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\nPASS: 3 loads" in printed
    assert printed.count("scaled down for a CPU") == 3
    code, result = run_json(capsys, "report", "--seed", "1")
    assert (code, result["verdict"]) == (0, "PASS")
    assert {cell["scaled_down_from"] for cell in result["cells"]} == set(report.LOADS.values())


def test_report_fails_above_a_threshold(capsys, monkeypatch):
    monkeypatch.setattr(report, "scaled_down", lambda sizes: sizes._replace(T=16, H=16, I=16, E=8))
    monkeypatch.setitem(accuracy.THRESHOLDS, torch.bfloat16, accuracy.Threshold(1e-9, 1e-9))
    code, result = run_json(capsys, "report")
    assert (code, result["verdict"]) == (1, "FAIL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thiek", "1,2,3"], "thiek='1,2,3': must be five integers"),
        (["--thiek", "8,20,8,4,2"], "hidden_size=20: must be a multiple of 8"),
        (["--thiek", "8,8,8,4,5"], "num_experts_per_tok=5: must be at most num_experts=4"),
        (["--thiek", "0,8,8,4,2"], "T=0: must be at least 1 to be timed"),
        (["--thiek", THIEK, "--trials", "0"], "trials=0: must be at least 1"),
        (["--thiek", THIEK, "--tile-m", "0"], "tile_m=0: must be at least 1"),
        (["--thiek", THIEK, "--device", "tpu"], "device='tpu': must be auto, cpu, cuda or cuda:N"),
        (["--thiek", "1000000,8192,8192,512,8"], "thiek=1000000,8192,8192,512,8: needs about"),
        (["--thiek", THIEK, "--routing", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, message):
    try:
        code = cli.main(["bench", "--device", "cpu", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.choose("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="device='cuda:1': this machine has 1 CUDA devices"):
        devices.choose("cuda:1")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_json(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "--json" in capsys.readouterr().out


def test_overview_names_every_command():
    result = subprocess.run([sys.executable, "-m", "sonicmoe", "--help"], capture_output=True, text=True, check=True)
    assert all(f"    {command} " in result.stdout for command in cli.COMMANDS)
