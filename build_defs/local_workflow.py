"""Runs the GPU workflow's own steps on this machine, job by job and shard by shard, as its runners would.

python -m build_defs.local_workflow --work DIR [--matrix FILE] [--replace FILE OLD NEW] [--fork]

Every job gets a checkout of its own with the working tree's tracked files, its ``run`` steps run as they are written, and artefacts,
outputs and summaries go from job to job as GitHub passes them on. Stand-ins on PATH take the place of what a machine without a GPU and
without a network lacks: ``python3`` finds nox and the packages installed, runs the cpu profile where hopper is asked for, builds one
kernel instead of all, and has the tests marked gpu skipped; ``nvidia-smi`` reports an idle H100. Exit code 0 where the last job, the
gate, is green, 1 where it is red.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).absolute().parents[1]
WORKFLOW = ".github/workflows/gpu.yml"
REPOSITORY = "owner/sonicmoe"
KERNEL = "dispatch.bounds"
"""The one that is built here; hundreds would take an hour of one core."""

PYTHON3 = """#!/usr/bin/env bash
# Stands in for python3 on PATH and in virtual environments; see build_defs/local_workflow.py.
set -euo pipefail
environment() {
    mkdir -p "$1/bin"
    ln -sf "$(realpath "$0")" "$1/bin/python"
}
case "${1:-} ${2:-} ${3:-}" in
"-m pip "*) exit 0 ;;
"-m venv "*) environment "$3" && exit ;;
"-m sonicmoe doctor") PYTHON "$@" || echo "the doctor is not obeyed here: this machine has no GPU" && exit 0 ;;
"-m nox "*) ;;
*) exec PYTHON "$@" ;;
esac
shift 2
case " $* " in *" --install-only "*) environment "$NOXENVDIR/gpu_matrix" && exit ;; esac
words=()
for word in "$@"; do
    case "$word" in
    gpu_tests) exec PYTHON -m pytest -q -m gpu ;;
    kernels) exec PYTHON -m cute_runtime build --quiet --variant KERNEL --out out/kernels ;;
    gpu_matrix) words+=(matrix) ;;
    hopper) words+=(cpu) ;;
    *) words+=("$word") ;;
    esac
done
case " $* " in *" gpu_matrix "*) words+=(--profile cpu) ;; esac
exec PYTHON -m nox --no-venv "${words[@]}"
"""
NVIDIA_SMI = "#!/bin/sh\necho 81000\n"

_EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
_TOKEN = re.compile(r"'[^']*'|&&|\|\||[!=]=|[()!,]|[A-Za-z_][\w.-]*|\s+")


@dataclass
class Ran:
    """What became of a job: its result, and what it leaves to others."""

    result: str
    outputs: dict[str, str] = field(default_factory=dict)
    summary: str = ""


def evaluate(expression: str, context: Mapping[str, Any], *, folder: Path | None = None, good: bool = True) -> Any:
    """The value of one GitHub expression: names, strings, comparisons, ``&&``, ``||`` and a few functions.

    Raises:
        ValueError: the expression has something else in it.
    """
    functions = {
        "fromJSON": json.loads,
        "always": lambda: True,
        "success": lambda: good,
        "hashFiles": lambda pattern: "hash" if folder and list(folder.glob(pattern)) else "",
    }
    words, end = [], 0
    for match in _TOKEN.finditer(expression):
        if match.start() != end:
            break
        end, token = match.end(), match.group()
        if token in ("&&", "||"):
            token = {"&&": " and ", "||": " or "}[token]
        elif re.match(r"[A-Za-z_]", token) and token not in functions:
            token = repr(_look_up(token, context))
        words.append(token)
    if end != len(expression):
        raise ValueError(f"{expression!r}: cannot be read from {expression[end:]!r} on")
    return eval("".join(words).strip(), {"__builtins__": {}}, functions)


def _look_up(name: str, context: Mapping[str, Any]) -> Any:
    value: Any = context
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def fill(text: str, context: Mapping[str, Any], folder: Path | None = None) -> str:
    """A text with the values of its expressions."""

    def value(match: re.Match[str]) -> str:
        found = evaluate(match.group(1).strip(), context, folder=folder)
        return "" if found is None else str(found)

    return _EXPRESSION.sub(value, text)


class LocalRun:
    """One run of a workflow.

    Args:
        work: an empty folder for checkouts, artefacts and outputs.
        tools: a folder that goes onto PATH before everything else.
        changes: file -> its text in every checkout, where it is not the working tree's.
        fork: whether the run is that of a fork's pull request; else of a push.
    """

    def __init__(self, workflow: dict[Any, Any], work: Path, tools: Path, changes: Mapping[str, str], *, fork: bool = False) -> None:
        self.workflow, self.work, self.tools, self.changes = workflow, work, tools, changes
        head = {"repo": {"full_name": "stranger/sonicmoe" if fork else REPOSITORY}}
        self.github = {"event_name": "pull_request" if fork else "push", "repository": REPOSITORY, "sha": "0" * 40}
        self.github["event"] = {"pull_request": {"head": head, "number": 1}}
        self.ran: dict[str, Ran] = {}

    def run(self) -> dict[str, Ran]:
        """Every job after those that it needs; returns what became of each."""
        jobs = dict(self.workflow["jobs"])
        while jobs:
            name = next(name for name, job in jobs.items() if set(_list(job.get("needs"))) <= self.ran.keys())
            self.ran[name] = self._job(name, jobs.pop(name))
            print(f"== job {name}: {self.ran[name].result}", flush=True)
        return self.ran

    def _job(self, name: str, job: dict[str, Any]) -> Ran:
        needs = {need: {"result": self.ran[need].result, "outputs": self.ran[need].outputs} for need in _list(job.get("needs"))}
        context = {
            "github": self.github,
            "needs": needs,
            "vars": {},
            "runner": {"os": "Linux", "tool_cache": str(self.work / "tool_cache")},
        }
        good = all(need["result"] == "success" for need in needs.values())
        condition = str(job.get("if", "success()"))
        # Without a function of its own, a condition stands behind success().
        wanted = evaluate(condition, context, good=good) and (good or "always()" in condition)
        if not wanted:
            return Ran("skipped")
        matrix = job.get("strategy", {}).get("matrix")
        if isinstance(matrix, str):
            matrix = evaluate(_EXPRESSION.fullmatch(matrix).group(1).strip(), context)
        results = []
        for index, values in enumerate(matrix["include"] if matrix else [{}]):
            place = self.work / (f"{name}-{index}" if matrix else name)
            _check_out(place, self.changes)
            own = {**context, "matrix": values, "strategy": {"job-index": index}, "github": {**self.github, "workspace": str(place)}}
            results.append(self._steps(job, place, own))
        worst = "failure" if any(one.result == "failure" for one in results) else "success"
        outputs = {key: fill(text, {"steps": {"plan": {"outputs": results[0].outputs}}}) for key, text in job.get("outputs", {}).items()}
        return Ran(worst, outputs, "".join(one.summary for one in results))

    def _steps(self, job: dict[str, Any], place: Path, context: dict[str, Any]) -> Ran:
        good = True
        files = {name: self.work / f"{place.name}.{name.lower()}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.touch()
        for step in job["steps"]:
            condition = str(step.get("if", "success()"))
            if not (evaluate(condition, context, folder=place, good=good) and (good or "always()" in condition)):
                continue
            title = step.get("name") or step.get("uses", "").split("@")[0] or step["run"].splitlines()[0]
            print(f"-- {place.name}: {title}", flush=True)
            if "run" in step:
                variables = {**self.workflow.get("env", {}), **job.get("env", {}), **step.get("env", {})}
                filled = {key: fill(str(text), context, place) for key, text in variables.items()}
                succeeded = self._shell(step["run"], place, {**filled, **{name: str(file) for name, file in files.items()}})
            else:
                succeeded = self._use(step, place, context)
            good = good and succeeded
        outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines() if "=" in line)
        return Ran("success" if good else "failure", outputs, files["GITHUB_STEP_SUMMARY"].read_text())

    def _shell(self, script: str, place: Path, variables: dict[str, str]) -> bool:
        """As GitHub runs a script: bash that stops at the first failure."""
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **variables, "PATH": path, "PYTHONPATH": str(place)}
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
        return subprocess.run(command, cwd=place, env=environment, check=False).returncode == 0

    def _use(self, step: dict[str, Any], place: Path, context: dict[str, Any]) -> bool:
        action = step["uses"].split("@")[0]
        given = {key: fill(str(value), context, place) for key, value in step.get("with", {}).items()}
        store = self.work / "artifacts"
        if action == "actions/upload-artifact":
            source = place / given["path"]
            if not source.is_dir() or not any(source.rglob("*")):
                return given.get("if-no-files-found") != "error"
            shutil.copytree(source, store / given["name"])
        elif action == "actions/download-artifact":
            found = [folder for folder in sorted(store.glob("*")) if fnmatch.fnmatch(folder.name, given.get("pattern") or given["name"])]
            for folder in found:
                shutil.copytree(folder, place / given["path"] / (folder.name if "pattern" in given else ""), dirs_exist_ok=True)
            return bool(found) or "pattern" in given
        elif action not in ("actions/checkout", "actions/setup-python", "actions/cache"):
            raise ValueError(f"uses={action}: is not known here")
        return True


def _list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


def _check_out(place: Path, changes: Mapping[str, str]) -> None:
    """The tracked files of the working tree, with the changes."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    for name, text in changes.items():
        (place / name).write_text(text)


def write_tools(folder: Path) -> Path:
    """The stand-ins."""
    folder.mkdir(parents=True)
    for name, text in (("python3", PYTHON3.replace("PYTHON", sys.executable).replace("KERNEL", KERNEL)), ("nvidia-smi", NVIDIA_SMI)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def replaced(file: str, old: str, new: str) -> str:
    """A file of the working tree with one text replaced by another.

    Raises:
        ValueError: the text is not in it.
    """
    text = (ROOT / file).read_text()
    if old not in text:
        raise ValueError(f"replace={file}: does not hold {old!r}")
    return text.replace(old, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="stands in for testing/matrix.yaml; a few cells are enough")
    parser.add_argument("--replace", nargs=3, action="append", default=[], metavar=("FILE", "OLD", "NEW"), help="a change to all checkouts")
    parser.add_argument("--fork", action="store_true", help="as a fork's pull request")
    arguments = parser.parse_args()
    changes = {file: replaced(file, old, new) for file, old, new in arguments.replace}
    if arguments.matrix:
        changes["testing/matrix.yaml"] = arguments.matrix.read_text()
    tools = write_tools(arguments.work.absolute() / "tools")
    workflow = yaml.safe_load((ROOT / WORKFLOW).read_text())
    ran = LocalRun(workflow, arguments.work.absolute(), tools, changes, fork=arguments.fork).run()
    last = list(ran)[-1]
    print(f"\n{ran[last].summary}\n{last}: {'green' if ran[last].result == 'success' else 'red'}")
    return 0 if ran[last].result == "success" else 1


if __name__ == "__main__":
    sys.exit(main())
