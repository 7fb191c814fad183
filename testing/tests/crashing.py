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
            time.sleep(600)
    log = os.environ.get("MATRIX_TEST_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{name} {seed}\n")
    return {"checks": CHECKS, "errors": ERRORS}


def setup():
    return measure
