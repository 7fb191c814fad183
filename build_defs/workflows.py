"""What this repository demands of its GitHub workflows beyond what check-jsonschema and zizmor know."""

import ast
import re
from collections.abc import Iterator
from typing import Any

PINNED = re.compile(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
NOT_A_FORK = "github.event_name != 'pull_request' || github.event.pull_request.head.repo.full_name == github.repository"
OPTIONAL_RUNNER = re.compile(rf"vars\.[A-Z_]+ == 'yes' && \({re.escape(NOT_A_FORK)}\)")
"""For a runner that a repository may lack: without the variable the job is skipped instead of waiting for a machine."""


def nox_sessions(source: str) -> set[str]:
    """The names of the sessions in a noxfile: its decorated functions. (``nox --list --json`` names the default ones only.)"""
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.decorator_list}


def workflow_problems(name: str, text: str, workflow: dict[Any, Any], labels: set[str]) -> Iterator[str]:
    """One sentence for each rule that a workflow breaks.

    Args:
        name: the file's name, for the sentences.
        text: the file.
        workflow: the file as parsed by PyYAML, which reads the key ``on`` as True.
        labels: the labels of self-hosted runners listed in actionlint.yaml.
    """
    triggers = workflow[True]
    if "pull_request_target" in triggers or "workflow_run" in triggers:
        yield f"{name}: runs on pull_request_target or workflow_run, which give a fork's code this repository's rights"
    if workflow.get("permissions") != {}:
        yield f"{name}: permissions must be {{}} at the top, each job names its own"
    if "concurrency" not in workflow:
        yield f"{name}: has no concurrency group"
    for line in text.splitlines():
        if "uses:" in line and not PINNED.search(line.strip().removeprefix("- ")):
            yield f"{name}: not pinned to a commit with its version as a comment: {line.strip()}"
    for job_name, job in workflow["jobs"].items():
        yield from job_problems(f"{name}: job {job_name}", job, labels)


def job_problems(where: str, job: dict[str, Any], labels: set[str]) -> Iterator[str]:
    """The broken rules of one job."""
    if "timeout-minutes" not in job:
        yield f"{where}: has no timeout-minutes"
    if job.get("permissions") != {"contents": "read"}:
        yield f"{where}: permissions must be contents: read and nothing else"
    for step in job["steps"]:
        if step.get("uses", "").startswith("actions/checkout@") and step.get("with", {}).get("persist-credentials") is not False:
            yield f"{where}: a checkout keeps its credentials"
        if "${{" in step.get("run", ""):
            yield f"{where}: a script contains an expression; pass it through env: {step['run'].splitlines()[0]}"
    if "self-hosted" in job["runs-on"]:
        condition = job.get("if", "")
        if condition != NOT_A_FORK and not OPTIONAL_RUNNER.fullmatch(condition):
            yield f"{where}: is self-hosted and does not say `if: {NOT_A_FORK}`"
        if "environment" not in job:
            yield f"{where}: is self-hosted and has no environment"
        unknown = set(job["runs-on"]) - {"self-hosted", "linux", "x64"} - labels
        if unknown:
            yield f"{where}: labels {sorted(unknown)} are not listed in .github/actionlint.yaml"
