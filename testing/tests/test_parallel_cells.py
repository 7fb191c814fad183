import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testing.matrix import gate, plan
from testing.matrix.cells import Matrix, ParallelCell, load_matrix
from testing.matrix.checks_parallel import _answer
from testing.matrix.describe import describe, not_run_reason, split_of
from testing.matrix.located import MatrixError
from testing.matrix.results import NOT_RUN
from testing.tests import crashing, small_matrix

ON_CPU = "{name: cpu, thiek: [10, 16, 8, 4, 2], routing: softmax, processes: 4}"
ON_GPUS = "{name: gpus, thiek: [10, 16, 8, 4, 2], routing: softmax, processes: 2, on_gpus: true, split: [3, 7]}"
SECTION = f"""parallel:
  - group: spread
    about: Experts on several processes.
    cells:
      - {ON_CPU}
      - {ON_GPUS}
speed:
"""


def load(folder: Path, *replacements: tuple[str, str]) -> Matrix:
    return load_matrix(small_matrix.write(folder, ("speed:\n", SECTION), *replacements))


def test_cells_say_how_many_gpus_they_need(tmp_path: Path):
    on_cpu, on_gpus = load(tmp_path).cells_of("parallel")
    assert isinstance(on_cpu, ParallelCell)
    assert (on_cpu.gpus, on_cpu.needs_gpu, on_gpus.gpus, on_gpus.needs_gpu) == (0, False, 2, True)
    assert [not_run_reason(on_cpu, gpus=0), not_run_reason(on_gpus, gpus=2)] == ["", ""]
    assert not_run_reason(on_gpus, gpus=1) == "needs 2 sm_90 GPUs"


def test_tokens_are_split_evenly_or_as_told(tmp_path: Path):
    on_cpu, on_gpus = load(tmp_path).cells_of("parallel")
    assert split_of(on_cpu) == (2, 3, 2, 3)
    assert split_of(on_gpus) == (3, 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("processes: 4}", "processes: 3}", "E=4 must be a multiple of processes=3"),
        ("split: [3, 7]", "split: [3, 8]", "split has 2 numbers with sum 11; it must be processes=2 numbers with sum T=10"),
        ("processes: 4}", "processes: 4, transport: symmetric_memory}", "transport symmetric_memory needs on_gpus: true"),
        ("processes: 4}", "processes: 4, transport: pigeon}", "transport 'pigeon' is not one of all_to_all, symmetric_memory"),
        ("  grouped: {method: top_k", "  softmax2: {method: top_k, selection_bias: 0.1}\n  grouped: {method: top_k", None),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, old: str, new: str, message: str | None):
    if message is None:
        replacements = ((old, new), ("routing: softmax, processes: 4", "routing: softmax2, processes: 4"))
        message = "routing softmax2 has a selection bias, which parallel cells do not have"
    else:
        replacements = ((old, new),)
    with pytest.raises(MatrixError, match=r"cell spread/(cpu|gpus)") as refused:
        load(tmp_path, *replacements)
    assert message in str(refused.value)


@pytest.mark.parametrize(("not_run", "passes"), [("spread/gpus", True), ("spread/cpu", False), ("speed/fast/forward", False)])
def test_only_a_cell_for_several_gpus_may_be_left_out_on_an_h100_runner(tmp_path: Path, not_run: str, passes: bool):
    matrix = load(tmp_path)
    profile = matrix.profiles["hopper"]
    cells = []
    for cell in matrix.cells:
        speed = {"ms": 1.0, "bound_ms": 1.0, "ratio": 1.0, "tflops": 1.0, "trials": 5, "ms_spread": 0.0, "ratio_spread": 0.0}
        ran = {"status": "passed", "checks": crashing.CHECKS, "errors": crashing.ERRORS, **(speed if cell.kind == "speed" else {})}
        cells.append({**describe(cell, profile), **({"status": NOT_RUN, "why": ""} if cell.name == not_run else ran)})
    path = tmp_path / "result.json"
    result = {"schema": 1, "profile": "hopper", "sources": "abc", "seed": 1, "shard": "1/1", "seconds": 5.0, "cells": cells}
    path.write_text(json.dumps(result))
    verdict = gate.decide(matrix, [path], "hopper")
    assert verdict.passed is passes, verdict.reasons
    assert [reason.split(":")[0] for reason in verdict.reasons] == ([] if passes else [not_run])


def test_plan_knows_what_each_costs(tmp_path: Path):
    matrix = load(tmp_path)
    on_cpu, on_gpus = matrix.cells_of("parallel")
    profile = matrix.profiles["cpu"]
    assert plan.cost_seconds(on_cpu, profile) == 2 * plan.cost_seconds(on_gpus, profile) > 0
    assert plan.memory_bytes(on_cpu, profile) > plan.memory_bytes(dataclasses.replace(on_cpu, processes=2), profile)


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_answer_is_the_first_process_s():
    processes = [start("print('noise'); print('answer: {\"checks\": []}')"), start("print('answer: 1')")]
    assert _answer(processes, time.monotonic() + 60) == {"checks": []}


def test_a_process_that_fails_is_named_with_its_last_line():
    processes = [start("import time; time.sleep(60)"), start("print('one', flush=True); raise SystemExit('boom')")]
    with pytest.raises(RuntimeError, match=r"process 1 ended with 1: boom"):
        _answer(processes, time.monotonic() + 60)
    processes[0].kill()


def test_a_process_that_hangs_is_named():
    processes = [start("print('answer: {}')"), start("import time; time.sleep(60)")]
    processes[0].wait()
    with pytest.raises(RuntimeError, match=r"no answer in time from process 1"):
        _answer(processes, time.monotonic() + 0.2)
    processes[1].kill()
