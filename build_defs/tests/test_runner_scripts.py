import json
import os
import subprocess
from pathlib import Path

import pytest

RUNNER = Path(__file__).absolute().parents[2] / ".github" / "runner"
HOME = "owner/sonicmoe"


def job_started(tmp_path: Path, *, event: str, head: str | None = None, repository: str = HOME) -> subprocess.CompletedProcess[str]:
    payload = tmp_path / "event.json"
    payload.write_text(
        json.dumps({"pull_request": {"head": {"repo": {"full_name": head} if head else None}}} if event == "pull_request" else {})
    )
    environment = {
        "PATH": os.environ["PATH"],
        "GITHUB_REPOSITORY": repository,
        "GITHUB_EVENT_NAME": event,
        "GITHUB_EVENT_PATH": str(payload),
        "SONICMOE_RUNNER_REPOSITORY": HOME,
    }
    return subprocess.run([RUNNER / "job-started.sh"], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("event", ["push", "merge_group", "workflow_dispatch"])
def test_machine_accepts_the_repositorys_own_events(tmp_path: Path, event: str):
    assert job_started(tmp_path, event=event).returncode == 0


def test_machine_accepts_a_pull_request_of_the_repository(tmp_path: Path):
    assert job_started(tmp_path, event="pull_request", head=HOME).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"event": "pull_request", "head": "stranger/sonicmoe"}, "comes from the fork stranger/sonicmoe"),
        ({"event": "pull_request", "head": None}, "comes from the fork None"),
        ({"event": "pull_request_target"}, "event 'pull_request_target' is not"),
        ({"event": "issue_comment"}, "event 'issue_comment' is not"),
        ({"event": "push", "repository": "stranger/sonicmoe"}, "repository 'stranger/sonicmoe' is not owner/sonicmoe"),
    ],
    ids=["fork", "deleted_fork", "pull_request_target", "comment", "other_repository"],
)
def test_machine_refuses_other_code(tmp_path: Path, arguments: dict[str, str], why: str):
    result = job_started(tmp_path, **arguments)
    assert result.returncode != 0
    assert why in result.stderr


def test_machine_without_its_repository_refuses_everything(tmp_path: Path):
    environment = {"PATH": os.environ["PATH"], "GITHUB_REPOSITORY": "", "GITHUB_EVENT_NAME": "push"}
    result = subprocess.run([RUNNER / "job-started.sh"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0


def wait_for_gpu(tmp_path: Path, free_mib: list[int], gib: int) -> subprocess.CompletedProcess[str]:
    """Runs the script against a stand-in for nvidia-smi that reports these GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {mib}\n" for mib in free_mib))
    tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run([RUNNER / "wait-for-gpu.sh", str(gib), "0"], env=environment, capture_output=True, text=True, check=False)


def test_wait_ends_when_one_gpu_has_the_memory(tmp_path: Path):
    result = wait_for_gpu(tmp_path, [1000, 70_000, 9_000], 60)
    assert (result.returncode, result.stdout) == (0, "a GPU has 70000 MiB free\n")


def test_wait_gives_up_with_the_best_it_saw(tmp_path: Path):
    result = wait_for_gpu(tmp_path, [1000, 30_000], 60)
    assert result.returncode == 1
    assert "no GPU had 60 GiB free within 0 s (the best has 30000 MiB)" in result.stderr
