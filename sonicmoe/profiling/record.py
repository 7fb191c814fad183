"""Records steps with torch.profiler: first the steps that are measured, then, where pageable copies were seen, their lines of code."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sonicmoe.profiling import trace
from sonicmoe.profiling.lines import LineMarks
from sonicmoe.profiling.memory import is_pageable_upload, lines_of_copies
from sonicmoe.profiling.stepped import Stepped


class Recorder(Stepped):
    """Turns the profiler on and off between steps.

    ``warmup`` steps run under the profiler and are thrown away; then ``steps`` + 1 are recorded, the last of which only closes the
    steady state (see `steady`). If they held copies from pageable memory, two more steps find the lines of code that make them; these
    lines, and nothing else, are added to the recording.

    Args:
        on_gpu: whether to record the GPU's activities too.
        metadata: kept in the trace for the analysis; see `trace.Trace`.
    """

    def __init__(self, *, warmup: int, steps: int, on_gpu: bool, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(warmup=warmup, steps=steps)
        self._metadata = dict(metadata or {})
        self._on_gpu = on_gpu
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._exit = ExitStack()
        self._profile: profile | None = None
        self._recorded: dict[str, Any] = {}
        self._left = self._recording = 0
        self._finish: Callable[[dict[str, Any]], bool] = self._measured

    def start(self) -> None:
        self._begin(self.warmup, self.steps + 1, self._measured, record_shapes=True)

    def step(self) -> bool:
        self._left -= 1
        if self._on_gpu and self._left in (self._recording, 0):
            # A host that runs ahead would else take the GPU's last warmup steps for the first that count, and end the recording before
            # the GPU has done what it was given.
            torch.cuda.synchronize()
        self._profile.step()
        if self._left:
            return True
        self._exit.close()
        return self._finish(self._recorded)

    def stop(self) -> None:
        self._exit.close()

    def _begin(self, warmup: int, active: int, finish: Callable[[dict[str, Any]], bool], **options: Any) -> None:
        self._left, self._recording, self._finish = warmup + active, active, finish
        self._profile = profile(
            activities=self._activities,
            schedule=schedule(wait=0, warmup=warmup, active=active, repeat=1),
            on_trace_ready=self._export,
            **options,
        )
        self._exit.enter_context(self._profile)

    def _export(self, profiler: profile) -> None:
        with tempfile.TemporaryDirectory(prefix="sonicmoe-profile.") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            self._recorded = trace.load(path)

    def _measured(self, content: dict[str, Any]) -> bool:
        self.content = {**content, trace.METADATA: self._metadata}
        if not any(map(is_pageable_upload, trace.parse(content).gpu)):
            return False
        self._begin(1, 1, self._lines_found, with_stack=True)
        self._exit.enter_context(LineMarks())
        return True

    def _lines_found(self, content: dict[str, Any]) -> bool:
        self.content[trace.METADATA]["copy_lines"] = lines_of_copies(trace.parse(content))
        return False
