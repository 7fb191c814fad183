"""The gate: what passes, what fails, what is only listed, and what is no input at all."""

import copy
import json
import os
import subprocess
import sys

import pytest

from testing.matrix import gate
from testing.matrix.__main__ import main
from testing.matrix.cells import MatrixError
from testing.matrix.describe import describe, not_run_reason
from testing.tests import crashing, small_matrix


@pytest.fixture
def matrix(tmp_path):
    return small_matrix.load(tmp_path)


@pytest.fixture
def good(matrix):
    """A result of the cpu profile in which everything passes."""
    profile = matrix.profiles["cpu"]
    cells = []
    for cell in matrix.cells:
        reason = not_run_reason(cell, gpus=0)
        ran = {"status": "passed", "checks": crashing.CHECKS, "errors": crashing.ERRORS, "seconds": 1.0, "peak_mib": 100}
        cells.append({**describe(cell, profile), **({"status": "not run", "why": reason} if reason else copy.deepcopy(ran))})
    return {"schema": 1, "profile": "cpu", "sources": "abc", "seed": 1, "shard": "1/1", "seconds": 5.0, "cells": cells}


def decide(tmp_path, matrix, *results, expect=None):
    paths = []
    for index, result in enumerate(results):
        path = tmp_path / f"result-{index}.json"
        path.write_text(json.dumps(result))
        paths.append(path)
    return gate.decide(matrix, paths, expect)


def cell_of(result, name):
    return next(cell for cell in result["cells"] if cell["name"] == name)


def test_a_good_cpu_result_passes_and_lists_what_was_not_run(tmp_path, matrix, good):
    verdict = decide(tmp_path, matrix, good)
    assert verdict.passed
    assert (verdict.count("passed"), verdict.count("not run")) == (4, 1)
    assert cell_of(verdict.merged, "speed/fast/forward")["passed"] is None


def test_a_missing_cell_fails(tmp_path, matrix, good):
    good["cells"] = [cell for cell in good["cells"] if cell["name"] != "layer/two"]
    verdict = decide(tmp_path, matrix, good)
    assert not verdict.passed
    assert verdict.reasons == ["layer/two: missing: no result has this cell"]


@pytest.mark.parametrize(("value", "passes"), [(1e-2, True), (1.0000001e-2, False), (None, False), (float("nan"), False)])
def test_the_threshold_is_the_last_value_that_passes_and_nan_never_does(tmp_path, matrix, good, value, passes):
    cell_of(good, "layer/one")["errors"]["dx"]["whole"] = value
    verdict = decide(tmp_path, matrix, good)
    assert verdict.passed is passes
    assert all("layer/one: failed: dx whole" in reason for reason in verdict.reasons)


def test_the_worst_block_counts_although_the_whole_tensor_is_good(tmp_path, matrix, good):
    cell_of(good, "layer/one")["errors"]["dw_up"] = {"whole": 1e-3, "worst_block": 0.5}
    assert decide(tmp_path, matrix, good).reasons == ["layer/one: failed: dw_up worst_block 5.00e-01 > 2.0e-02"]


def test_a_recorded_pass_is_judged_again(tmp_path, matrix, good):
    cell_of(good, "route/rounded")["checks"] = [{"name": "whole tiles", "passed": False, "why": "expert 3"}]
    assert decide(tmp_path, matrix, good).reasons == ["route/rounded: failed: whole tiles: expert 3"]


def test_a_tensor_that_was_not_measured_fails(tmp_path, matrix, good):
    del cell_of(good, "layer/two")["errors"]["db_up"]
    assert decide(tmp_path, matrix, good).reasons == ["layer/two: failed: db_up was not measured"]


def test_a_cell_without_checks_fails(tmp_path, matrix, good):
    cell_of(good, "count/e4")["checks"] = []
    assert decide(tmp_path, matrix, good).reasons == ["count/e4: failed: nothing was checked"]


def test_not_run_is_no_excuse_for_a_cell_that_needs_no_gpu(tmp_path, matrix, good):
    cell_of(good, "layer/one").update(status="not run", why="no time")
    assert decide(tmp_path, matrix, good).reasons == ["layer/one: failed: was not run, and needs no GPU: no time"]


def test_not_run_fails_under_the_hopper_profile(tmp_path, matrix, good):
    profile = matrix.profiles["hopper"]
    good["profile"] = "hopper"
    for cell in matrix.cells:
        cell_of(good, cell.name).update(describe(cell, profile))
    assert decide(tmp_path, matrix, good).reasons == ["speed/fast/forward: not run: needs an sm_90 GPU"]


def test_a_cell_that_was_run_at_other_sizes_fails(tmp_path, matrix, good):
    cell_of(good, "layer/one")["thiek"][0] = 8
    assert "was run with thiek [8, 768, 256, 8, 2], the matrix says [1024" in decide(tmp_path, matrix, good).reasons[0]


def test_inputs_that_are_not_one_run_are_refused(tmp_path, matrix, good):
    half, other = copy.deepcopy(good), copy.deepcopy(good)
    half["cells"], other["cells"] = half["cells"][:2], other["cells"][2:]
    assert decide(tmp_path, matrix, half, other).passed
    for change, problem in (({"sources": "xyz"}, "has sources xyz"), ({"profile": "hopper"}, "has profile hopper")):
        with pytest.raises(MatrixError, match=problem):
            decide(tmp_path, matrix, half, {**other, **change})
    with pytest.raises(MatrixError, match=r"cell layer/one is in .*result-0.json too"):
        decide(tmp_path, matrix, good, half)
    with pytest.raises(MatrixError, match="was run with the profile cpu, expected hopper"):
        decide(tmp_path, matrix, good, expect="hopper")
    with pytest.raises(MatrixError, match="cell layer/three is not in"):
        decide(tmp_path, matrix, {**good, "cells": [{"name": "layer/three", "status": "passed"}]})


WRONG_TYPES = [
    (("seconds",), "long", "seconds='long': must be a number"),
    (("seed",), [1], "seed=[1]: must be an integer, as of one shard"),
    (("device",), 3, "device=3: must be a text or null"),
    (("cells", 0), [], "has a cell without a name"),
    (("cells", 0, "status"), ["passed"], "cell layer/one: has no known status"),
    (("cells", 0, "errors"), [1], "cell layer/one: errors=[1]: must be an object or null"),
    (("cells", 0, "errors", "dx"), 1e-3, "cell layer/one: errors.dx=0.001: must be an object"),
    (("cells", 0, "errors", "dx", "whole"), "0", "cell layer/one: errors.dx.whole='0': must be a number or null"),
    (("cells", 0, "checks", 0), "stands", "cell layer/one: checks[0]='stands': must be an object"),
    (("cells", 0, "checks", 0, "why"), None, "cell layer/one: checks[0].why=None: must be a text"),
    (("cells", 0, "thiek"), 1024, "cell layer/one: thiek=1024: must be a list of five integers from 0 or nulls"),
    (("cells", 0, "kernels"), {"up_projection": {"ms": True}}, "cell layer/one: kernels.up_projection.ratio is missing"),
    (("cells", 0, "ratio"), 0.5, "cell layer/one: bound_ms is missing"),
    (("cells", 0, "peak_mib"), "100", "cell layer/one: peak_mib='100': must be a number or null"),
]


@pytest.mark.parametrize(("place", "value", "problem"), WRONG_TYPES)
def test_a_value_of_another_type_is_named_with_its_file_cell_and_field(tmp_path, matrix, good, place, value, problem):
    *folders, field = place
    part = good
    for folder in folders:
        part = part[folder]
    part[field] = value
    with pytest.raises(MatrixError) as refused:
        decide(tmp_path, matrix, good)
    assert str(refused.value) == f"{tmp_path / 'result-0.json'}: {problem}"


def test_an_error_of_a_tensor_that_no_threshold_names_is_not_shown(tmp_path, matrix, good, capsys):
    cell_of(good, "layer/one")["errors"]["dq"] = {"whole": 1.0, "worst_block": 1.0}
    path = tmp_path / "shard-1-of-1.json"
    path.write_text(json.dumps(good))
    assert main(["gate", str(path), "--matrix", str(matrix.path), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"date": None}, "date=None: must be a text"),
        ({"cells": [{"name": "speed/fast/forward", "ratio": "0.8"}]}, "cells[0].ratio='0.8': must be a positive number or null"),
        ({"cells": [3]}, "cells[0]=3: must be an object"),
    ],
)
def test_a_value_of_another_type_in_a_recorded_result_is_named(tmp_path, matrix, good, capsys, change, problem):
    records = tmp_path / "records"
    records.mkdir()
    record = {"device": "NVIDIA H100", "power_limit_w": 700.0, "date": "2026-01-02", "cells": []}
    (records / "one.json").write_text(json.dumps(record | change))
    path = tmp_path / "shard-1-of-1.json"
    path.write_text(json.dumps(good))
    command = ["gate", str(path), "--matrix", str(matrix.path), "--history", str(records), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err == f"error: {records / 'one.json'}: {problem}\n"


def test_the_command_line_exits_with_0_1_or_2(tmp_path, matrix, good, capsys):
    results = tmp_path / "results"
    results.mkdir()
    path = results / "shard-1-of-1.json"
    path.write_text(json.dumps(good))
    gate_command = ["gate", str(results), "--matrix", str(matrix.path), "--json"]
    assert main([*gate_command, "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["gate"] == "passed"
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"merged.json", "report.html", "report.md"}
    cell_of(good, "layer/one")["errors"]["o"]["whole"] = 1.0
    path.write_text(json.dumps(good))
    assert main(gate_command) == 1
    assert json.loads(capsys.readouterr().out)["reasons"] == ["layer/one: failed: o whole 1.00e+00 > 1.0e-02"]
    path.write_text("{}")
    for argv in (gate_command, ["gate", "nowhere"], ["plan", "--shards", "0", "--profile", "cpu"], ["run", "--shard", "one"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_plan_prints_one_line_of_json(capsys):
    assert main(["plan", "--shards", "2", "--profile", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert [entry["shard"] for entry in json.loads(out)["include"]] == ["1/2", "2/2"]


def test_planning_and_deciding_need_no_torch(tmp_path, matrix, good):
    path = tmp_path / "shard-1-of-1.json"
    path.write_text(json.dumps(good))
    program = "import sys; sys.modules['torch'] = None; from testing.matrix.__main__ import main; sys.exit(main(sys.argv[1:]))"
    for argv in (["plan", "--shards", "2", "--profile", "hopper"], ["gate", str(path), "--json"]):
        command = [sys.executable, "-c", program, *argv, "--matrix", str(matrix.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, ended.stderr
