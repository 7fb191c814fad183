"""What runs steps for a recording: the caller announces each step's end, and is told whether another one is wanted."""

from collections.abc import Callable
from typing import Any


class Stepped:
    """The base of `record.Recorder` and `nsys.CaptureRange`.

    Attributes:
        content: the trace as a JSON object, once `step` has returned False; None where something else keeps it.
    """

    def __init__(self, *, warmup: int, steps: int) -> None:
        for name, value in (("warmup", warmup), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.warmup, self.steps = warmup, steps
        self.content: dict[str, Any] | None = None

    def start(self) -> None:
        """Before the first step."""

    def step(self) -> bool:
        """After each step; returns whether another one is wanted."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends the recording early, after an error in a step; after the last step it does nothing."""

    def run(self, step: Callable[[], object]) -> dict[str, Any] | None:
        """Calls ``step`` until all is recorded; returns ``content``."""
        self.start()
        try:
            step()
            while self.step():
                step()
        finally:
            self.stop()
        return self.content
