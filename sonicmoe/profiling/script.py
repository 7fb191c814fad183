"""A script's own steps under the recorder: those of a function ``step()`` that it defines, or of its optimizer."""

import ast
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from sonicmoe.profiling.stepped import Stepped


class _RecordedError(BaseException):
    """Leaves the script once all is recorded; no handler of exceptions in it catches this."""


def record(path: Path, arguments: list[str], recorder: Stepped) -> dict[str, Any] | None:
    """Run a script until its steps are recorded; returns the trace's JSON object.

    A script that defines ``step()`` at its top level is imported (``__name__`` is not ``"__main__"``) and step() called again and
    again. Any other is run as a program, each ``optimizer.step()`` ends a step, and it is left after the last step that is needed.

    Raises:
        ValueError: there is no such script, it is no Python, or it ends before enough steps.
        RuntimeError: the script raises a ValueError or TypeError; its own exceptions of other types pass as they are.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"script={str(path)!r}: cannot be read: {error.strerror}") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"script={str(path)!r}: is not Python: {error}") from None
    with _program(path, arguments):
        if any(isinstance(node, ast.FunctionDef) and node.name == "step" for node in tree.body):
            step = _own_errors(path, lambda: runpy.run_path(str(path), run_name="sonicmoe_profile"))["step"]
            return recorder.run(lambda: _own_errors(path, step))
        return _optimizer_steps(path, recorder)


def _own_errors(path: Path, function: Callable[[], Any]) -> Any:
    """The function's result. The command line shows a ValueError of its own as one line; a script's needs its traceback."""
    try:
        return function()
    except (ValueError, TypeError) as error:
        raise RuntimeError(f"{path} raised {type(error).__name__}: {error}") from error


def _optimizer_steps(path: Path, recorder: Stepped) -> dict[str, Any] | None:
    ended = 0

    def after_step(*_: object) -> None:
        nonlocal ended
        ended += 1
        if not recorder.step():
            raise _RecordedError

    recorder.start()
    handle = register_optimizer_step_post_hook(after_step)
    try:
        _own_errors(path, lambda: runpy.run_path(str(path), run_name="__main__"))
    except _RecordedError:
        return recorder.content
    except SystemExit:
        pass  # the script's way to end
    finally:
        handle.remove()
        recorder.stop()
    needed = recorder.warmup + recorder.steps + 3
    raise ValueError(
        f"script={str(path)!r}: ended after {ended} optimizer steps: must define step(), or make {needed} steps of an optimizer "
        f"(fewer with a smaller --warmup or --steps)"
    )


@contextmanager
def _program(path: Path, arguments: list[str]) -> Iterator[None]:
    """sys.argv and sys.path as the script would have them alone."""
    argv, folders = sys.argv, list(sys.path)
    sys.argv, sys.path[:] = [str(path), *arguments], [str(path.resolve().parent), *folders]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, folders
