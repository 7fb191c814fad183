"""Processes of this machine that form a group and call functions together, kept alive between tests: each takes seconds to import torch."""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sonicmoe.parallel.launch import without_multicast

_device = torch.device("cpu")


def device() -> torch.device:
    """That of the rank which asks."""
    return _device


class RankError(RuntimeError):
    """A function raised on some ranks, or they are gone; the message names each, with its traceback."""


class LocalGroup:
    """W processes in one group, as a context manager.

    Args:
        processes: W.
        device: "cpu" with gloo, "cuda" with NCCL and a GPU for each process, or "cuda:0" with gloo and this GPU for all.
        timeout_s: of the group's collectives.
    """

    def __init__(self, processes: int, *, device: str = "cpu", timeout_s: float = 60.0) -> None:
        self.timeout_s, self._size, self._device = timeout_s, processes, device
        self._start()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        port = _free_port()
        self.sound = True
        """Whether `run` has returned from every call: after one that has not, ranks may be gone, or wait for each other."""
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(self._size):
            mine, theirs = spawn.Pipe()
            arguments = (theirs, rank, self._size, self._device, port, self.timeout_s)
            process = spawn.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self) -> "LocalGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def renewed(self) -> "LocalGroup":
        """This group, with new processes where a call has failed: one failure is not to take the tests after it along."""
        if not self.sound:
            self.close()
            self._start()
        return self

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank; the results by rank.

        Raises:
            RankError: it raised somewhere, or a process is gone or does not answer.
        """
        self.sound, results = False, self.attempt(function, *arguments)
        failed = {rank: result for rank, result in enumerate(results) if isinstance(result, _Raised | _Gone)}
        if failed:
            raise RankError("\n".join(f"rank {rank}{self._what(rank, result)}" for rank, result in failed.items()))
        self.sound = True
        return results

    def _what(self, rank: int, result: "_Raised | _Gone") -> str:
        if isinstance(result, _Raised):
            return f":\n{result.text}"
        if result.silent:
            return f" did not answer within {4 * self.timeout_s:.0f} s"
        self.processes[rank].join(timeout=5)
        return f" is gone (exit code {self.processes[rank].exitcode})"

    def errors(self, function: Callable[..., Any], *arguments: Any) -> list[str | None]:
        """The last line of what ``function`` raised on each rank, None where it returned or the process is gone."""
        results = self.attempt(function, *arguments)
        return [result.text.strip().splitlines()[-1] if isinstance(result, _Raised) else None for result in results]

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results by rank, _Raised or _Gone where there is none."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # of a process that is gone: _receive finds out
                pipe.send((function, arguments))
        return [self._receive(pipe) for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        """A process that hangs is not waited for: the group's timeout has passed for all its collectives by then."""
        try:
            return pipe.recv() if pipe.poll(4 * self.timeout_s) else _Gone(silent=True)
        except (EOFError, ConnectionResetError):
            return _Gone(silent=False)

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10 if self.sound else 1)
            if process.is_alive():
                process.kill()
                process.join()


@dataclass(frozen=True)
class _Gone:
    silent: bool
    """Whether the process is there and says nothing."""


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(pipe: Connection, rank: int, processes: int, device: str, port: int, timeout_s: float) -> None:
    global _device
    torch.set_num_threads(1)
    without_multicast()
    backend, _device = ("nccl", torch.device("cuda", rank)) if device == "cuda" else ("gloo", torch.device(device))
    os.environ["LOCAL_RANK"] = str(rank if _device.index is None else _device.index)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout_s),
        device_id=_device if backend == "nccl" else None,
    )
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            result = function(*arguments)
        except Exception:
            result = _Raised(traceback.format_exc())
        pipe.send(result)
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
