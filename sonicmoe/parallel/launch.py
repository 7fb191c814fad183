"""The processes that torchrun has started, as a mesh: what the commands' option ``--expert-parallel`` does first."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sonicmoe.parallel.failures import naming_failures

_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off unless the environment says otherwise: nothing here gains from it, and where GPUs of one host are shared a
program that uses it can disturb the others."""

DEFAULT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Processes:
    """All processes of a command; every method that says so is a collective of them."""

    mesh: DeviceMesh
    """(replicas, expert): processes along "replicas" own the same experts."""
    device: torch.device
    owns_group: bool = False
    """Whether `start` made the process group, which `leave` then ends."""

    @property
    def expert(self) -> DeviceMesh:
        return self.mesh["expert"]

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def all_reduce(
        self, tensor: torch.Tensor, over: DeviceMesh | None = None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> torch.Tensor:
        """In place, over all processes or those of a one-dimensional mesh; a collective."""
        group = None if over is None else over.get_group()
        with naming_failures(group):
            dist.all_reduce(tensor, op=op, group=group)
        return tensor

    def barrier(self) -> None:
        with naming_failures():
            dist.barrier()

    def leave(self) -> None:
        """Ends the group that `start` made, once all is done: left to the interpreter's end, its threads may abort the process."""
        if self.owns_group:
            dist.destroy_process_group()

    def largest(self, value: float) -> float:
        """The largest of all processes' values; a collective."""
        return self.all_reduce(torch.tensor([value], dtype=torch.float64, device=self.device), op=dist.ReduceOp.MAX).item()

    def gather(self, value: object) -> list:
        """Every process's value, by rank; a collective."""
        values = [None] * self.size
        with naming_failures():
            dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Callable[[], object]) -> None:
        """The first process does something to files that all then look at; a collective."""
        if self.rank == 0:
            action()
        self.barrier()


def start(expert: int, device: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, command: str) -> Processes:
    """Join the group of the processes that torchrun has started (or take the one there is), with gloo on CPUs and NCCL on GPUs.

    Args:
        expert: how many processes share the experts of a layer.
        device: "auto", "cpu" or "cuda"; each process takes the GPU of its local rank.
        timeout_s: after which a collective fails whose other processes do not come.
        command: what was called, for the error.

    Raises:
        ValueError: it cannot be, in one sentence.
    """
    if expert < 1:
        raise ValueError(f"--expert-parallel {expert}: must be at least 1")
    if not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            example = f"torchrun --nproc-per-node {expert} -m sonicmoe {command} --expert-parallel {expert}"
            raise ValueError(f"--expert-parallel {expert}: must be started by torchrun, such as {example}")
        world = int(os.environ["WORLD_SIZE"])
        if world % expert:
            raise ValueError(f"--expert-parallel {expert}: must divide the {world} processes that torchrun has started")
    own = _device(device)
    owns_group = not dist.is_initialized()
    if owns_group:
        without_multicast()
        on_gpu = own.type == "cuda"
        timeout = timedelta(seconds=timeout_s)
        # Processes that torchrun restarts find the store of those before them; under one prefix for each start they do not read the
        # addresses of the dead (seen with torch 2.13: gloo "timed out connecting" in every other restart).
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"sonicmoe/start_{restarts()}", store)
        backend, device_id = ("nccl", own) if on_gpu else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id)
    mesh = init_device_mesh(own.type, (dist.get_world_size() // expert, expert), mesh_dim_names=("replicas", "expert"))
    return Processes(mesh, own, owns_group)


def without_multicast() -> None:
    """Before a process's first group."""
    for name, value in _NO_MULTICAST.items():
        os.environ.setdefault(name, value)


def restarts() -> int:
    """How often torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r}: must be auto, cpu or cuda with --expert-parallel, where each process has its own GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(f"--nproc-per-node: local rank {local} has no GPU, this machine has {torch.cuda.device_count()}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
