"""The line of code behind each PyTorch call, as a range in the profiler's trace.

torch.profiler's ``with_stack`` gives functions by the line on which they begin. Here the line that runs is put around each call of the
thread that records; calls of other threads have ``with_stack``'s functions only. It costs microseconds a call, so that nothing but
the lines is taken from such a recording.
"""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import record_function

from sonicmoe.profiling.memory import LINE

_TORCH = os.path.dirname(torch.__file__) + os.sep


class LineMarks(TorchFunctionMode):
    """While it is entered, each PyTorch call of this thread is a range named after its line, "sonicmoe line train.py:12 fetch"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        with record_function(LINE + describe(sys._getframe(1))):
            return func(*args, **(kwargs or {}))


def describe(frame: FrameType | None) -> str:
    """ "file.py:12 function" of the innermost frame outside of torch; the file relative to the working folder where it is below it."""
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None:
        return ""
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    # Kineto writes names into JSON as they are.
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}".replace('"', "'").replace("\\", "/")
