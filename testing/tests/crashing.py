"""Work for worker processes that fails in the ways that real cells do."""

import os
import time
from pathlib import Path
from typing import Any

CHECKS = [{"name": "stands", "passed": True, "why": ""}]
ERRORS = {name: {"whole": 1e-3, "worst_block": 2e-3} for name in ("o", "dx", "dw_up", "dw_down", "db_up", "db_down", "drouter")}


def measure(name: str, seed: int) -> dict[str, Any]:
    """Good measurements for any cell; what a name does beyond that is told by the folder MATRIX_TEST_DIR."""
    told = Path(os.environ.get("MATRIX_TEST_DIR", "/nowhere")) / name.replace("/", "-")
    if told.exists():
        order = told.read_text()
        if order == "die":
            os.abort()
        if order == "exit":
            os._exit(7)
        if order == "hang":
            told.with_suffix(".pid").write_text(str(os.getpid()))
            time.sleep(600)
    log = os.environ.get("MATRIX_TEST_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{name} {seed}\n")
    return {"checks": CHECKS, "errors": ERRORS}


def setup():
    return measure


def note_gpu(name: str, seed: int) -> dict[str, Any]:
    """Writes which GPU a cell had, and when it began and ended, to MATRIX_TEST_LOG."""
    gpu, begin = os.environ.get("CUDA_VISIBLE_DEVICES"), time.monotonic()
    time.sleep(0.05)
    with open(os.environ["MATRIX_TEST_LOG"], "a", encoding="utf-8") as stream:
        stream.write(f"{name} {gpu} {begin} {time.monotonic()} {os.getpid()}\n")
    return {"checks": CHECKS, "errors": ERRORS}


def lose_first(name: str, seed: int) -> dict[str, Any]:
    """A cell that breaks its process, as an illegal address on a GPU does, and others that do not."""
    return {"pid": os.getpid(), "process_lost": name == "first"}


def setup_losing():
    return lose_first


def setup_noting():
    return note_gpu


class Setup:
    """Work whose measurements are wrong in the way that the name says; can be sent to a new process."""

    def __init__(self, wrong: str) -> None:
        self.wrong = wrong

    def __call__(self):
        return self.measure

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        errors = {tensor: dict(values) for tensor, values in ERRORS.items()}
        if self.wrong == "the worker dies":
            os._exit(7)
        if self.wrong == "dx ten times its limit" and name.startswith("layer/"):
            errors["dx"]["whole"] = 0.1
        if self.wrong == "o not finite":
            errors["o"]["worst_block"] = None
        holds = self.wrong != "a check fails"
        return {"checks": [{"name": "stands", "passed": holds, "why": "" if holds else "fell"}], "errors": errors}
