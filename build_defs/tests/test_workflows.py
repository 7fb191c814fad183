import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from build_defs.workflows import nox_sessions, workflow_problems

ROOT = Path(__file__).absolute().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GPU = ROOT / ".github" / "workflows" / "gpu.yml"


def listed_labels() -> set[str]:
    return set(yaml.safe_load((ROOT / ".github" / "actionlint.yaml").read_text())["self-hosted-runner"]["labels"])


def problems_of(text: str) -> list[str]:
    return list(workflow_problems("gpu.yml", text, yaml.safe_load(text), listed_labels()))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def scripts(path: Path) -> str:
    return "\n".join(step.get("run", "") for job in jobs(path).values() for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_keeps_the_rules(path: Path):
    text = path.read_text()
    assert list(workflow_problems(path.name, text, yaml.safe_load(text), listed_labels())) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  pull_request:\n", "  pull_request_target:\n", "runs on pull_request_target"),
        ("permissions: {}", "permissions: write-all", "permissions must be {} at the top"),
        ("      contents: read", "      contents: write", "permissions must be contents: read"),
        ("@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7", "not pinned to a commit"),
        ("persist-credentials: false", "persist-credentials: true", "a checkout keeps its credentials"),
        ("    if: github.event_name != 'pull_request' ||", "    if: true ||", "is self-hosted and does not say"),
        ("TWO_GPU_RUNNER == 'yes' && (github", "TWO_GPU_RUNNER == 'yes' || (github", "is self-hosted and does not say"),
        ("    environment: h100\n", "", "is self-hosted and has no environment"),
        ("x64, h100]", "x64, h200]", "labels ['h200'] are not listed"),
        ("    timeout-minutes: 30\n", "", "has no timeout-minutes"),
        ('-- --shard "$SHARD"', "-- --shard ${{ matrix.shard }}", "a script contains an expression"),
    ],
    ids=lambda value: None,
)
def test_broken_rule_is_reported(old: str, new: str, expected: str):
    text = GPU.read_text()
    assert old in text
    assert any(expected in problem for problem in problems_of(text.replace(old, new)))


def test_gate_always_reports_on_all_jobs():
    gpu_jobs = jobs(GPU)
    assert gpu_jobs["gate"]["if"] == "always()"
    assert set(gpu_jobs["gate"]["needs"]) == gpu_jobs.keys() - {"gate"}
    first = gpu_jobs["gate"]["steps"][0]
    assert first["if"] == "needs.shards.result == 'skipped'"
    assert "exit 1" in first["run"]


def test_only_shards_and_tests_use_h100s():
    assert [name for name, job in jobs(GPU).items() if "self-hosted" in job["runs-on"]] == ["shards", "gpu-tests", "two-gpus"]
    assert jobs(GPU)["shards"]["strategy"]["fail-fast"] is False


def test_the_selftest_finds_on_its_h100_what_an_ordinary_runner_has_built():
    kernels, selftest = (jobs(GPU.with_name("selftest.yml"))[name] for name in ("kernels", "selftest"))
    built = {step["with"]["path"] for step in kernels["steps"] if "upload-artifact" in step.get("uses", "")}
    taken = [step["with"]["path"] for step in selftest["steps"] if "download-artifact" in step.get("uses", "")]
    assert built == {*taken} == {"out/kernels", "out/defects"}
    assert any(step.get("run", "").endswith("gate_selftest -- --build out/defects") for step in kernels["steps"])
    (step,) = [step for step in selftest["steps"] if "gate_selftest" in step.get("run", "")]
    assert step["env"]["SONICMOE_KERNELS"] == ":".join("${{ github.workspace }}/" + path for path in taken)
    assert "self-hosted" not in kernels["runs-on"]


def test_two_gpus_are_skipped_where_no_runner_is_announced_and_the_gate_says_so():
    assert jobs(GPU)["two-gpus"]["if"].startswith("vars.TWO_GPU_RUNNER == 'yes' && (")
    steps = {step.get("name"): step for step in jobs(GPU)["gate"]["steps"]}
    step = steps["Did expert parallelism run on two GPUs?"]
    assert step["if"] == "always()"
    assert step["env"] == {"TWO_GPUS": "${{ needs.two-gpus.result }}"}
    for result, code in (("success", 0), ("skipped", 0), ("failure", 1), ("cancelled", 1)):
        environment = {**os.environ, "TWO_GPUS": result, "GITHUB_STEP_SUMMARY": os.devnull}
        ran = subprocess.run(["bash", "-c", step["run"]], env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == code
        assert ran.stdout.startswith(f"Expert parallelism on two GPUs: {result}")
        assert ("no runner is labelled h100x2" in ran.stdout) is (result == "skipped")


def test_one_commit_per_action_across_workflows():
    pins = {match for path in WORKFLOWS for match in re.findall(r"uses: (\S+)@(\S+)", path.read_text())}
    actions = [action for action, _ in pins]
    assert sorted(actions) == sorted(set(actions))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_steps_call_sessions_and_scripts_that_exist(path: Path):
    called = set(re.findall(r"-m nox .*?-s (\w+)", scripts(path)))
    assert called <= nox_sessions((ROOT / "noxfile.py").read_text())
    for script in re.findall(r"(?m)(?:^|\s)(\.(?:ci|github)/\S+)", scripts(path)):
        assert os.access(ROOT / script, os.X_OK), script
