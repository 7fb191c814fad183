"""Processes of this machine that form a group and call functions together, kept alive between tests: each takes seconds to import torch."""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sonicmoe.parallel.launch import without_multicast


class RankError(RuntimeError):
    """A function raised on some ranks; the message holds each one's traceback."""


class LocalGroup:
    """W processes in one group, as a context manager.

    Args:
        processes: W.
        device_type: "cpu" with gloo, or "cuda" with NCCL and one GPU for each process.
        timeout_s: of the group's collectives.
    """

    def __init__(self, processes: int, *, device_type: str = "cpu", timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        spawn = multiprocessing.get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(processes):
            mine, theirs = spawn.Pipe()
            arguments = (theirs, rank, processes, device_type, port, timeout_s)
            process = spawn.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self.processes.append(process)

    def __enter__(self) -> "LocalGroup":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(*arguments)`` on every rank; the results by rank, None where a process is gone.

        Raises:
            RankError: it raised somewhere.
        """
        results = self.attempt(function, *arguments)
        failed = {rank: result for rank, result in enumerate(results) if isinstance(result, _Raised)}
        if failed:
            raise RankError("\n".join(f"rank {rank}:\n{result.text}" for rank, result in failed.items()))
        return results

    def errors(self, function: Callable[..., Any], *arguments: Any) -> list[str | None]:
        """The last line of what ``function`` raised on each rank, None where it returned or the process is gone."""
        results = self.attempt(function, *arguments)
        return [result.text.strip().splitlines()[-1] if isinstance(result, _Raised) else None for result in results]

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return [self._receive(pipe) for pipe in self._pipes]

    def _receive(self, pipe: Connection) -> Any:
        """A process that hangs is not waited for: the group's timeout has passed for all its collectives by then."""
        if not pipe.poll(4 * self.timeout_s):
            raise TimeoutError(f"a rank did not answer within {4 * self.timeout_s:.0f} s")
        try:
            return pipe.recv()
        except EOFError:
            return None

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


class _Raised:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(pipe: Connection, rank: int, processes: int, device_type: str, port: int, timeout_s: float) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    without_multicast()
    backend, device = "gloo", None
    if device_type == "cuda":
        backend, device = "nccl", torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
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
