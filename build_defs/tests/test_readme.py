"""The README's commands and example, run: the light ones as written, the heavy ones on one cell or as their --help."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from build_defs.workflows import nox_sessions

ROOT = Path(__file__).absolute().parents[2]
README = (ROOT / "README.md").read_text()
SESSIONS = nox_sessions((ROOT / "noxfile.py").read_text())


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """Commands in sh blocks and in the first column of tables."""
    lines = [line for block in blocks("sh", text) for line in block.splitlines() if line]
    return [part.strip() for line in lines for part in line.split("&&")] + re.findall(r"(?m)^\| `([^`]+)` \|", text)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


def test_example_runs_as_written(tmp_path: Path):
    (example,) = blocks("python")
    result = run(sys.executable, "-c", example, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(2, 32, 256) [")


def test_main_job_runs_on_one_cell_and_writes_its_report(tmp_path: Path):
    result = run(
        *(sys.executable, "-m", "nox", "--no-venv", "-s", "matrix", "--"),
        *("--profile", "cpu", "--cells", "tokens/t127", "--jobs", "1", "--seed", "1", "--out", str(tmp_path / "results")),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert {"report.html", "report.md"} <= {path.name for path in (tmp_path / "results").iterdir()}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/runner.md"])
def test_documented_sessions_exist(document: str):
    named = re.findall(r"nox (?:--no-venv )?-s (\w+)", (ROOT / document).read_text())
    assert named
    assert set(named) <= SESSIONS


@pytest.mark.parametrize("command", sorted({c for c in commands(README) if c.startswith(("sonicmoe ", "python -m "))}))
def test_documented_command_exists_with_its_options(command: str):
    words = shlex.split(command)
    words = [sys.executable, "-m", "sonicmoe", *words[1:]] if words[0] == "sonicmoe" else [sys.executable, *words[1:]]
    last = max(i for i, word in enumerate(words) if i < 5 and re.fullmatch(r"[a-z_.]+", word))
    result = run(*words[: last + 1], "--help")
    assert result.returncode == 0, result.stderr
    for option in re.findall(r"--\w+", command):
        assert option in result.stdout


def test_tables_are_those_of_the_recorded_results():
    result = run(sys.executable, "-m", "testing.readme_tables", "--check")
    assert result.returncode == 0, result.stderr


def test_every_session_is_documented():
    for session in SESSIONS - {"plan", "gate"}:  # these two are the workflow's
        assert f"nox -s {session}`" in README


def test_ci_calls_the_readmes_test_command():
    (command,) = [line for block in blocks("sh") for line in block.splitlines() if line.endswith("-s tests")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_example_cell_is_accepted_by_the_matrix(tmp_path: Path):
    (line,) = blocks("yaml")
    text = (ROOT / "testing" / "matrix.yaml").read_text()
    anchor = "      - {name: e8, thiek: [4096, 1024, 512, 8, 2]}\n"
    assert anchor in text
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(text.replace(anchor, anchor + line))
    result = run(
        sys.executable,
        *("-m", "testing.matrix", "plan", "--shards", "1", "--profile", "cpu", "--matrix", str(matrix), "--cells", "*/my-model"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["include"][0]["cells"] == 1


def test_links_lead_to_files():
    for document in ("README.md", "CONTRIBUTING.md", "docs/runner.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"


def test_gpu_matrix_without_a_gpu_says_so_in_one_sentence(tmp_path: Path):
    # Without nvidia-smi on PATH there is no GPU, whatever the machine has.
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvidia-smi").exists()]
    result = subprocess.run(
        [sys.executable, "-m", "nox", "--no-venv", "-s", "gpu_matrix"],
        cwd=ROOT,
        env={**environment(), "PATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "gpu_matrix needs an sm_90 GPU (H100, H200); this machine has none that nvidia-smi lists" in result.stderr
