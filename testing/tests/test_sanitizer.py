"""The suite `sanitizer` without a GPU: what the tools print, what its processes do, and its cases on PyTorch and an emulated kernel."""

import dataclasses
import os
import re
import subprocess
import threading
import types

import pytest
import torch

from cute_runtime import emulator
from sonicmoe.backends import reference
from sonicmoe.kernels.tiles import TALL, WIDE
from testing.matrix.checks_layer import poisoned
from testing.matrix.results import FAILED, NOT_RUN, PASSED
from testing.measure import run, sanitized, sanitizer, start
from testing.measure.items import Item, Options

FULL = Options(torch.device("cpu"), "hopper", False, 3)
"""On a CPU the processes compute the same cases with PyTorch."""

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\nvalues right\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= COMPUTE-SANITIZER\nvalues right\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
    "synccheck": "========= COMPUTE-SANITIZER\nvalues right\n========= ERROR SUMMARY: 0 errors\n",
}
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at kernel_cutlass_down_projection_TiledMMA_ThrLayoutVMNK+0x2150 in /home/user/sonicmoe/kernels/down_projection.py:118
=========     by thread (32,0,0) in block (4,0,0)
=========     Access at 0x7f2c5e000a00 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2c5e000800 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame:  [0x2e0a3b] in /usr/lib/x86_64-linux-gnu/libcuda.so.1
=========
values right
========= ERROR SUMMARY: 9 errors were not printed. Use --print-limit option to adjust the number of printed errors
========= ERROR SUMMARY: 12 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at kernel_cutlass_activation_backward_TiledMMA_ThrLayoutVMNK+0x29d0
=========     and Read access at kernel_cutlass_activation_backward_TiledMMA_ThrLayoutVMNK+0x167e0 [16 hazards]
=========
========= Error: Race reported between Write access at kernel_b+0x2a00
=========     and Read access at kernel_b+0x16800 [8 hazards]
=========
values right
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
SYNCCHECK = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block
=========     at kernel_place+0x3f0
=========     by thread (0,0,0) in block (0,0,0)
=========
values right
========= ERROR SUMMARY: 1 error
"""
RACE = (
    "Error: Race reported between Write access at kernel_cutlass_activation_backward_Tiled...+0x29d0 "
    "and Read access at kernel_cutlass_activation_backward_Tiled...+0x167e0 [16 hazards]"
)


@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_a_clean_run_counts_nothing(tool):
    assert sanitizer.read(tool, CLEAN[tool]) == (0, "")


@pytest.mark.parametrize(
    ("tool", "output", "count", "first"),
    [
        (
            "memcheck", MEMCHECK, 12,
            "Invalid __global__ read of size 4 bytes at kernel_cutlass_down_projection_TiledMMA_...+0x2150 in down_projection.py:118",
        ),
        ("racecheck", RACECHECK, 2, RACE),
        ("synccheck", SYNCCHECK, 1, "Barrier error detected. Divergent thread(s) in block at kernel_place+0x3f0"),
    ],
)  # fmt: skip
def test_reports_are_counted_and_the_first_is_quoted_without_folders(tool, output, count, first):
    assert sanitizer.read(tool, output) == (count, first)


def test_what_racecheck_calls_a_warning_counts():
    text = RACECHECK.replace("Error:", "Warning:").replace("(2 errors, 0 warnings)", "(0 errors, 2 warnings)")
    assert sanitizer.read("racecheck", text) == (2, RACE.replace("Error:", "Warning:"))


def test_a_tool_that_was_cut_off_has_found_nothing():
    assert all(sanitizer.read(tool, text.replace("SUMMARY", "")) is None for tool, text in CLEAN.items())


def item(name):
    return next(item for item in sanitizer.items(FULL) if item.name == name)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that puts a compute-sanitizer on PATH that runs its process and then prints a text."""

    def install(summary, command='"$@"'):
        (tmp_path / "summary").write_text(summary)
        path = tmp_path / sanitizer.SANITIZER
        path.write_text(f'#!/bin/sh\nshift 6\n{command}\nstatus=$?\ncat "{tmp_path}/summary"\nexit $status\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.fixture
def there(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)


def test_a_process_with_right_values_under_a_clean_tool_passes(fake):
    fake("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    (one,) = run.run_item(item("sanitizer/racecheck/plan"))
    assert (one["status"], one["why"]) == (PASSED, "")
    assert one["bound"] == {"value": 0, "unit": "hazards", "limit": 0, "rule": "at most"}
    assert one["process_s"] > 0


@pytest.mark.parametrize(
    ("tool", "summary", "command", "status", "why"),
    [
        ("racecheck", RACECHECK, "true", FAILED, f"2 hazards: must be at most 0; {RACE}"),
        ("synccheck", SYNCCHECK, "echo gone >&2; false", FAILED,
         "1 errors: must be at most 0; Barrier error detected. Divergent thread(s) in block at kernel_place+0x3f0"),
        ("memcheck", CLEAN["memcheck"], "echo 'AssertionError: dz of expert 3: 2.50 times what rounding explains' >&2; false", FAILED,
         "RuntimeError: the process ended with 1: AssertionError: dz of expert 3: 2.50 times what rounding explains"),
        ("memcheck", "========= ERROR SUMMARY: 0 errors\n", "echo nothing >&2", FAILED, "RuntimeError: the process ended with 0: nothing"),
        ("memcheck", "values right\n", "true", FAILED, "RuntimeError: memcheck printed no summary"),
        ("memcheck", CLEAN["memcheck"], "echo 'cute_runtime.load.MissingKernelError: top_k: no usable object in /x' >&2; false",
         NOT_RUN, "top_k: no usable object"),
        ("memcheck", "", "echo 'Timeout (0:05:00)!' >&2; false", FAILED, "RuntimeError: not done after 300 s"),
    ],
)  # fmt: skip
def test_what_does_not_pass_says_why(fake, tool, summary, command, status, why):
    fake(summary, command)
    (one,) = run.run_item(item(f"sanitizer/{tool}/layer"))
    assert (one["status"], one["why"]) == (status, why)


@pytest.mark.usefixtures("there")
def test_a_tool_that_does_not_end_is_a_failed_cell(monkeypatch):
    def run_child(command, timeout, environment):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(sanitizer, "run_child", run_child)
    assert run.run_item(item("sanitizer/memcheck/plan"))[0]["why"] == "RuntimeError: not done after 600 s"


@pytest.mark.parametrize(("output", "command", "status"), [(MEMCHECK, "false", PASSED), (CLEAN["memcheck"], "true", FAILED)])
def test_the_control_passes_where_its_fault_is_found(fake, output, command, status):
    fake(output, command)
    (one,) = run.run_item(item("sanitizer/memcheck/control"))
    assert one["status"] == status
    assert one["why"] == ("" if status == PASSED else "1 planted faults not found: must be at most 0")


def test_a_control_without_a_report_fails(fake):
    fake("", "echo gone >&2; false")
    (one,) = run.run_item(item("sanitizer/memcheck/control"))
    assert (one["status"], one["why"]) == (FAILED, "RuntimeError: the process ended with 1: gone")


def test_a_process_ends_itself_and_says_so():
    code = "import time; from testing.measure import sanitized; sanitized.CASES['x'] = lambda *_: time.sleep(60); sanitized.TIMEOUT_S = 0.1"
    done = start.run_child([start.sys.executable, "-c", f"{code}; sanitized.main('x', 'cpu', '0')"], 60, {})
    assert done.returncode == 1
    assert sanitized.STOPPED in done.stderr


def test_without_the_tool_or_a_gpu_nothing_is_run(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for options, why in (
        (FULL, "compute-sanitizer is not on PATH"),
        (dataclasses.replace(FULL, backend="reference"), "needs an sm_90 GPU"),
    ):
        cells = [cell for item in sanitizer.items(options) for cell in run.run_item(item)]
        assert len(cells) == 3 * len(sanitized.CASES) + 1
        assert {(cell["status"], cell["why"]) for cell in cells} == {(NOT_RUN, why)}


@pytest.mark.usefixtures("there")
def test_several_processes_run_at_a_time_and_only_those_that_were_chosen(monkeypatch):
    """Each waits for five others, so that one after the other none would end; and for what is measured before them."""
    monkeypatch.setattr(sanitizer, "PROCESSES", 6)
    meeting, ran = threading.Barrier(sanitizer.PROCESSES, timeout=20), []

    def run_child(command, timeout, environment):
        ran.append((command[2], bool(environment)))
        meeting.wait()
        return subprocess.CompletedProcess(command, 0, CLEAN[command[2]], "")

    monkeypatch.setattr(sanitizer, "run_child", run_child)
    first = Item("other/a/plan", lambda: [{"status": PASSED if not ran else FAILED}])
    suites = {"other": [first], "sanitizer": sanitizer.items(FULL)}
    monkeypatch.setattr(run.registry, "load", lambda name: types.SimpleNamespace(items=lambda options: suites[name]))
    cells = [cell for cells in run.run_suites(list(suites), FULL, pattern="*/*/[pl]*") for cell in cells]
    assert sorted(ran) == sorted(2 * [("memcheck", True), ("racecheck", False), ("synccheck", False)])
    assert len(cells) == 7
    assert {cell["status"] for cell in cells} == {PASSED}


@pytest.mark.parametrize("name", sanitized.CASES)
def test_each_case_holds_on_pytorch(name):
    with poisoned():
        sanitized.CASES[name]("cpu", 1)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("up_projection", "up-pair"),
        ("down_projection", "down-broad"),
        ("activation_backward", "activation-backward-pair"),
        ("dx_rows", "dx-rows-wide"),
    ],
)
def test_a_case_sees_one_wrong_row(monkeypatch, operation, name):
    right = getattr(reference, operation)

    def wrong(*args, **options):
        result = right(*args, **options)
        (result[0] if isinstance(result, tuple) else result)[0].neg_()
        return result

    monkeypatch.setattr(reference, operation, wrong)
    with poisoned(), pytest.raises(AssertionError, match="what rounding explains"):
        sanitized.CASES[name]("cpu", 1)


def test_a_case_runs_the_kernels_where_it_can(monkeypatch):
    monkeypatch.setattr(sanitized, "COUNTS", sanitized.COUNTS[:1])
    with poisoned(), emulator.emulation() as launches:
        for name in ("dx-rows-tall", "dx-rows-wide"):
            sanitized.CASES[name]("cpu", 1)
    assert [launch.block for launch in launches] == [(tile.threads, 1, 1) for tile in (TALL, WIDE)]


def test_names_are_one_for_each_tool_and_case():
    names = [item.name for item in sanitizer.items(FULL)]
    assert len(set(names)) == len(names) == len(sanitizer.TOOLS) * len(sanitized.CASES) + 1
    assert all(re.fullmatch(r"sanitizer/(mem|race|sync)check/[a-z-]+", name) for name in names)
