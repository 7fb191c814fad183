"""What a check says."""

from dataclasses import dataclass

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        name: of the check.
        status: ok, warn, fail or skipped.
        message: what was found, one line; the reason where it was skipped.
        remedy: what to do, one line; empty where there is nothing to do.
    """

    name: str
    status: str
    message: str
    remedy: str = ""


class UnavailableError(Exception):
    """A source of facts is missing or broken. ``remedy`` says what to do about it."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def exit_code(findings: list[Finding], *, strict: bool) -> int:
    """1 where a check failed, else 2 for warnings under ``strict``, else 0."""
    statuses = {finding.status for finding in findings}
    if FAIL in statuses:
        return 1
    return 2 if strict and WARN in statuses else 0


def one_line(text: object) -> str:
    """An exception's or a program's last line, which is where both say what happened."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1] if lines else type(text).__name__
