"""The GPU workflow's steps, run here as runners would: what goes from job to job, and what makes the gate red."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from build_defs import local_workflow
from build_defs.local_workflow import LocalRun, evaluate, fill

# Stands in for nox: two shards, each of which writes one result; the gate passes where no result says "bad".
PYTHON3 = """#!/usr/bin/env bash
set -euo pipefail
case "$*" in
"-m pip install nox") ;;
"-m venv .venv") mkdir -p .venv/bin && ln -s "$0" .venv/bin/python ;;
*"--install-only -s gpu_matrix") mkdir -p "$NOXENVDIR/gpu_matrix/bin" && ln -sf "$(realpath "$0")" "$NOXENVDIR/gpu_matrix/bin/python" ;;
"-m sonicmoe doctor") ;;
*"-s kernels -- --tests") mkdir -p out/kernels && echo object > out/kernels/kernel.so ;;
*"-s gpu_tests") test -f "$SONICMOE_KERNELS/kernel.so" ;;
*"-s plan"*) echo 'shards={"include": [{"shard": "1/2"}, {"shard": "2/2"}]}' >> "$GITHUB_OUTPUT" ;;
*"-s gpu_matrix -- --shard "*)
    test -f "$SONICMOE_KERNELS/kernel.so"
    mkdir matrix_results
    cp verdict "matrix_results/shard-$(echo "$SHARD" | sed 's|/|-of-|').json"
    ;;
*"-s gate -- shards --expect-profile hopper --out gate")
    mkdir gate
    ls shards/*/*.json > gate/report.md
    ! grep -l bad shards/*/*.json >> gate/report.md
    ;;
*) echo "unexpected: $*" >&2; exit 3 ;;
esac
"""


@pytest.fixture
def workflow(tmp_path: Path, monkeypatch):
    """Runs gpu.yml with the stand-ins and no files but a verdict in each checkout."""
    tools = local_workflow.write_tools(tmp_path / "tools")
    (tools / "python3").write_text(PYTHON3)

    def check_out(place: Path, changes: dict[str, str]) -> None:
        place.mkdir()
        for name, text in {**changes, ".github/runner/wait-for-gpu.sh": WAIT.read_text()}.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
            (place / name).chmod(0o755)

    monkeypatch.setattr(local_workflow, "_check_out", check_out)

    def start(verdict: str = "good", *, edit=lambda text: text, fork: bool = False) -> dict[str, local_workflow.Ran]:
        text = edit((local_workflow.ROOT / local_workflow.WORKFLOW).read_text())
        return LocalRun(yaml.safe_load(text), tmp_path, tools, {"verdict": verdict}, fork=fork).run()

    return start


WAIT = local_workflow.ROOT / ".github" / "runner" / "wait-for-gpu.sh"


def results(ran: dict[str, local_workflow.Ran]) -> dict[str, str]:
    return {name: job.result for name, job in ran.items()}


def test_shards_come_from_the_plan_and_all_results_reach_the_gate(workflow):
    ran = workflow()
    assert results(ran) == {
        "kernels": "success",
        "plan": "success",
        "gpu-tests": "success",
        "two-gpus": "skipped",
        "shards": "success",
        "gate": "success",
    }
    two_gpus, *shown, tests = ran["gate"].summary.strip().splitlines()
    assert two_gpus.startswith("Expert parallelism on two GPUs: skipped; ")
    assert tests == "Tests on a GPU: success."
    assert " ".join(shown).split() == ["shards/matrix-0/shard-1-of-2.json", "shards/matrix-1/shard-2-of-2.json"]


def test_a_bad_result_turns_the_gate_red_and_is_still_shown(workflow):
    ran = workflow("bad")
    assert results(ran) == {
        "kernels": "success",
        "plan": "success",
        "gpu-tests": "success",
        "two-gpus": "skipped",
        "shards": "success",
        "gate": "failure",
    }
    assert ran["gate"].summary.count("shard-1-of-2.json") == 2


def test_a_test_that_fails_on_a_gpu_turns_the_gate_red_and_the_results_are_still_shown(workflow):
    ran = workflow(edit=lambda text: text.replace("-s gpu_tests\n", "-s gpu_tests && false\n"))
    assert (ran["shards"].result, ran["gpu-tests"].result, ran["gate"].result) == ("success", "failure", "failure")
    assert "shard-1-of-2.json" in ran["gate"].summary
    assert ran["gate"].summary.endswith("Tests on a GPU: failure.\n")


def test_a_forks_pull_request_reaches_no_shard_and_the_gate_is_red_with_the_reason(workflow):
    ran = workflow(fork=True)
    assert results(ran) == {
        "kernels": "success",
        "plan": "success",
        "gpu-tests": "skipped",
        "two-gpus": "skipped",
        "shards": "skipped",
        "gate": "failure",
    }
    assert "this comes from a fork. A maintainer who has read it can push the commit to a gpu/ branch." in ran["gate"].summary


def test_kernels_that_do_not_build_turn_the_gate_red(workflow):
    ran = workflow(edit=lambda text: text.replace("-s kernels -- --tests", "-s kernels"))
    assert results(ran) == {
        "kernels": "failure",
        "plan": "success",
        "gpu-tests": "skipped",
        "two-gpus": "skipped",
        "shards": "skipped",
        "gate": "failure",
    }
    assert "did not run: kernels failure, plan success" in ran["gate"].summary


def test_a_machine_that_the_doctor_refuses_runs_no_shard(workflow):
    ran = workflow(edit=lambda text: text.replace("-m sonicmoe doctor", "-m sonicmoe doctor && false"))
    assert (ran["shards"].result, ran["gate"].result) == ("failure", "failure")
    assert "shard-" not in ran["gate"].summary


def test_a_shard_that_breaks_leaves_the_others_results_and_the_gate_decides_on_them(workflow):
    ran = workflow(edit=lambda text: text.replace("--out matrix_results", '--out matrix_results && test "$SHARD" = 1/2'))
    assert (ran["shards"].result, ran["gate"].result) == ("failure", "success")


def test_expressions():
    context = {"needs": {"plan": {"result": "skipped"}}, "github": {"event_name": "push"}}
    assert evaluate("needs.plan.result == 'skipped'", context) is True
    assert evaluate("github.event_name != 'pull_request' || needs.missing.deep == 'x'", context) is True
    assert evaluate("always() && github.event_name == 'x'", context) is False
    assert fill("a ${{ github.event_name }} b${{ vars.NONE }}", context) == "a push b"
    with pytest.raises(ValueError, match="cannot be read from"):
        evaluate("1 + 2", context)


def test_the_stand_in_for_python_runs_nox_with_the_cpu_profile(tmp_path: Path):
    tools = local_workflow.write_tools(tmp_path / "tools")
    text = (tools / "python3").read_text().replace(f"exec {sys.executable} -m nox", "echo nox")
    (tools / "python3").write_text(text)
    asked = (
        "-s plan -- --profile hopper --shards 4",
        "--envdir X -s gpu_matrix -- --shard 1/4",
        "-s gate -- shards --expect-profile hopper",
    )
    answers = [os.popen(f"{tools}/python3 -m nox {words}").read().strip() for words in asked]
    assert answers == [
        "nox --no-venv -s plan -- --profile cpu --shards 4",
        "nox --no-venv --envdir X -s matrix -- --shard 1/4 --profile cpu",
        "nox --no-venv -s gate -- shards --expect-profile cpu",
    ]


def test_a_replacement_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"replace=README.md: does not hold 'no such text'"):
        local_workflow.replaced("README.md", "no such text", "")
