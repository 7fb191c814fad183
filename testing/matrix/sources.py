"""A fingerprint of the code under test, so that results of different code are never merged or resumed."""

import hashlib
from pathlib import Path

PACKAGES = ("cute_runtime", "dispatch", "routing", "sonicmoe", "testing")


def fingerprint(matrix_path: Path) -> str:
    """First 16 hex digits of SHA-256 over the packages' sources and the matrix file, whatever the machine."""
    root = Path(__file__).resolve().parent.parent.parent
    digest = hashlib.sha256(matrix_path.read_bytes())
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            if "/tests/" not in f"/{relative}":
                digest.update(relative.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
