"""What a run writes and the gate reads: one JSON object per shard, as design.md's recorded results, and its parts."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from testing.matrix.located import MatrixError
from testing.matrix.result_types import cell_problem, result_problem

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
NO_FLOOR = "no threshold yet"
"""Of a speed cell that was measured and has no floor to be judged by: listed, neither passed nor failed."""
SCHEMA = 1


class Check(NamedTuple):
    """One property of a cell; `why` says what was wrong, and is empty when it holds."""

    name: str
    passed: bool
    why: str = ""


def check(name: str, holds: bool, why: str) -> Check:
    """A check that keeps its reason only when it fails."""
    return Check(name, bool(holds), "" if holds else why)


def write_atomically(path: Path, text: str) -> None:
    """Write next to the target, then rename, so that a killed run leaves the old file or the new one, never half.

    Raises:
        MatrixError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MatrixError(f"{path}: cannot be written: {error.strerror}") from None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write one shard's result."""
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Read one shard's result.

    Raises:
        MatrixError: the file cannot be read or is not a shard's result of this program.
    """
    result = read_recorded(path)
    if "shard" not in result:
        raise MatrixError(f"{path}: shard is missing")
    if not isinstance(result["seed"], int):
        raise MatrixError(f"{path}: seed={result['seed']}: must be an integer, as of one shard")
    return result


def read_recorded(path: Path) -> dict[str, Any]:
    """Read a result, of a shard or merged by the gate.

    Raises:
        MatrixError: the file cannot be read or is not a result of this program.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MatrixError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MatrixError(f"{path}: is not JSON: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not isinstance(result.get("cells"), list):
        raise MatrixError(f"{path}: is not a matrix result of schema {SCHEMA}")
    for key in ("profile", "sources", "seed"):
        if key not in result:
            raise MatrixError(f"{path}: {key} is missing")
    if problem := result_problem(result):
        raise MatrixError(f"{path}: {problem}")
    for cell in result["cells"]:
        if problem := cell_problem(cell):
            raise MatrixError(f"{path}: {problem}")
        if cell.get("status") not in (PASSED, FAILED, NOT_RUN, NO_FLOOR):
            raise MatrixError(f"{path}: cell {cell['name']}: has no known status")
    return result


def find_results(arguments: list[str]) -> list[Path]:
    """The result files that were named: files as they are, folders by the shard files in and below them.

    Raises:
        MatrixError: a path does not exist or a folder holds no result.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(path.rglob("shard-*-of-*.json"))
            if not inside:
                raise MatrixError(f"{path}: holds no shard-I-of-N.json")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise MatrixError(f"{path}: there is no such file or folder")
    return list(dict.fromkeys(path.resolve() for path in found))
