import json
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

from sonicmoe import environment


def test_describes_this_machine_in_json():
    described = json.loads(json.dumps(environment.describe("cpu")))
    assert described["device"]
    assert described["driver"] is None
    assert described["power_limit_w"] is None
    assert described["versions"]["torch"] == torch.__version__
    assert datetime.fromisoformat(described["date"]).tzinfo is not None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_dirty_follow_the_checkout(monkeypatch, tmp_path):
    source = tmp_path / "environment.py"
    source.write_text("first")
    monkeypatch.setattr(environment, "__file__", str(source))
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]

    def git(*arguments):
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    assert environment._source_state() == {"commit": None, "dirty": None}
    git("add", "environment.py")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert environment._source_state() == {"commit": commit, "dirty": False}
    source.write_text("second")
    assert environment._source_state() == {"commit": commit, "dirty": True}


def test_missing_packages_and_commands_are_none(monkeypatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package-at-all"))
    assert environment.versions()["no-such-package-at-all"] is None
    assert environment._output([str(Path("no") / "such" / "command")]) is None


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        ("/scratch/me/results/h100.json", "h100.json"),
        ("--out=/scratch/me/h100.json", "--out=h100.json"),
        ("sonic-moe=/opt/a:/opt/b/packages", "sonic-moe=a:packages"),
        ("testing/results/h100.json", "testing/results/h100.json"),
        ("16384,4096,1024,128,8", "16384,4096,1024,128,8"),
        ("two-gpus/*", "'two-gpus/*'"),
    ],
)
def test_a_recorded_command_has_no_folders_of_the_machine(word, recorded):
    assert environment.command("sonicmoe", word) == f"sonicmoe {recorded}"
