"""The gate's selftest: what the gate misses, what crashes instead of being wrong, and untouched code that fails, each end it badly."""

import json

import pytest

from testing.matrix import selftest
from testing.matrix.__main__ import main
from testing.tests import crashing, small_matrix

MACHINE = {"device": "test", "driver": None, "power_limit_w": None, "versions": {}, "commit": None, "dirty": None, "date": "2026-01-01"}
OPTIONS = selftest.SelftestOptions(jobs=1, cores=2, seed=1, gpus=0, command="test")


@pytest.fixture
def run(tmp_path):
    matrix = small_matrix.load(tmp_path)

    def start(defects, untouched="good"):
        lines = []
        tested = selftest.run_selftest(
            matrix,
            matrix.profiles["cpu"],
            defects,
            lambda name: crashing.Setup(untouched if name is None else name),
            OPTIONS,
            MACHINE,
            ended=lambda name, good, line: lines.append((name, good)),
        )
        return tested, sorted(lines)

    return start


def test_caught_defects_name_their_cell_tensor_and_margin(run):
    tested, lines = run({"dx ten times its limit": "layer/one", "a check fails": "route/rounded", "o not finite": "layer/two"})
    assert tested.reasons == []
    assert [(o.defect, o.cell, o.caught, o.by, o.margin) for o in tested.outcomes] == [
        ("dx ten times its limit", "layer/one", True, "dx whole", pytest.approx(10)),
        ("a check fails", "route/rounded", True, "stands", None),
        ("o not finite", "layer/two", True, "o worst block", float("inf")),
    ]
    assert [cell["name"] for cell in tested.untouched] == ["layer/one", "layer/two", "route/rounded"]
    assert [cell["share"] for cell in tested.untouched] == [pytest.approx(0.1), pytest.approx(0.1), None]
    assert lines == [("a check fails", True), ("dx ten times its limit", True), ("o not finite", True), ("untouched code", True)]
    assert json.loads(json.dumps(tested.as_json(), allow_nan=False))["passed"] is True
    assert "PASS: 3 of 3 defects caught; untouched, 3 of 3 cells pass" in selftest.markdown(tested)


def test_a_defect_that_nothing_shows_survives(run):
    tested, lines = run({"good": "layer/one", "a check fails": "layer/two"})
    assert tested.reasons == ["good: survives in layer/one: the gate passes"]
    assert ("good", False) in lines
    assert "| good | layer/one |  | **survives** |" in selftest.markdown(tested)


def test_a_defect_that_crashes_its_cell_proves_nothing(run):
    tested, _ = run({"the worker dies": "layer/one"})
    assert tested.reasons == ["the worker dies: survives in layer/one: layer/one: failed: the worker died: exit status 7"]


def test_untouched_code_that_fails_is_named_with_its_cell(run):
    tested, _ = run({"a check fails": "layer/one"}, untouched="dx ten times its limit")
    assert tested.reasons == ["untouched code: layer/one: dx whole 1.00e-01 > 1.0e-02"]
    assert [outcome.caught for outcome in tested.outcomes] == [True]


def test_a_real_defect_goes_through_workers_and_gate(tmp_path, capsys):
    command = ["selftest", "--profile", "cpu", "--jobs", "1", "--seed", "1", "--defects", "outputs tiny", "--out", str(tmp_path), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(defect["defect"], defect["cell"], defect["caught"]) for defect in found["defects"]] == [("outputs tiny", "tokens/t129", True)]
    assert found["defects"][0]["margin"] > 100
    assert {path.name for path in tmp_path.iterdir()} == {"selftest.json", "selftest.md"}


def test_a_pattern_that_names_no_defect_is_refused(capsys):
    assert main(["selftest", "--profile", "cpu", "--defects", "none such"]) == 2
    assert "--defects none such: matches none of the" in capsys.readouterr().err
