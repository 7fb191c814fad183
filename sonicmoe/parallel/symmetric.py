"""The transport whose sizes stay on the device: torch's symmetric memory and its all_to_all_vdev (NVSHMEM).

No host read, so that a layer can be captured in a CUDA graph; in return every buffer has a fixed size, the worst case unless a
capacity is named. Rows behind those that came are padding: their slots are sentinels, which the experts skip.

Protocol of `torch.ops.symm_mem.all_to_all_vdev(input, out, in_splits, out_splits_offsets, group)`: every process writes its splits
and offsets into its peers' ``out_splits_offsets``, all meet in a barrier on the device, and each then reads its rows out of its
peers' ``input``. A process may be one exchange ahead of a peer that still reads: so there are two sets of everything that a
peer touches, used in turn, and the barrier of the exchange between two uses of a set is what makes reuse safe. ``out`` is the
process's own; rows are copied out of it, as those of the next exchange overwrite it.
NVLink multicast is not used; `sonicmoe.parallel.launch` switches it off for the process.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sonicmoe.parallel.failures import naming_failures
from sonicmoe.parallel.transport import Announced, Leg, Legs

_BLOCKS = (64, 16)
"""The most blocks of all_to_all_vdev, within a host and otherwise."""

_FULL_BYTES = 64 * 16 * 1024 * 8
"""From this many bytes of input on it takes them all; it counts one block for 16 bytes of each of its threads, eight times over."""

_ARGUMENTS = ("input", "out", "in_splits", "out_splits_offsets", "group_name")

Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str], None]


def why_not(device: torch.device) -> str | None:
    """Why this transport cannot run here, or None."""
    if device.type != "cuda":
        return f"the mesh is on {device.type}, must be on GPUs"
    import torch.distributed._symmetric_memory as symmetric_memory

    if not symmetric_memory.is_nvshmem_available():
        return f"torch {torch.__version__} does not find NVSHMEM, which its CUDA builds bring along"
    try:
        arguments = tuple(argument.name for argument in torch.ops.symm_mem.all_to_all_vdev.default._schema.arguments)
    except AttributeError:
        arguments = ()
    if arguments != _ARGUMENTS:
        return f"torch {torch.__version__} has no symm_mem.all_to_all_vdev({', '.join(_ARGUMENTS)}), 2.9 and later do"
    return None


def buffer_shape(rows: int, row_bytes: int, processes: int) -> tuple[int, int]:
    """(rows, stride in bytes) of a buffer for ``rows`` rows of ``row_bytes`` that all_to_all_vdev takes whatever the splits.

    It reads from each peer with ``max(blocks // processes, 1)`` blocks in equal parts and stops the device where splits times stride do
    not divide evenly (nvshmem_extension.cu, allToAllV); ``blocks`` grows with the input's bytes up to 64 within a host and 16 otherwise,
    or is TORCH_SYMMMEM_NBLOCKS. So the buffer is large enough for the most, and the stride a multiple of what each peer then gets.
    """
    blocks = [int(os.environ.get("TORCH_SYMMMEM_NBLOCKS", "0")), *_BLOCKS]
    unit = math.lcm(16, *(max(count // processes, 1) for count in blocks))
    stride = -(-max(row_bytes, 1) // unit) * unit
    return max(rows, -(-_FULL_BYTES // stride)), stride


@functools.cache
def shared(group: dist.ProcessGroup, device: torch.device, chunk_tokens: int, capacity: float | None) -> "SymmetricMemory":
    """One transport, and one set of buffers, for all layers with the same needs: their exchanges come one after the other."""
    return SymmetricMemory(group, device, chunk_tokens=chunk_tokens, capacity=capacity)


class SymmetricMemory:
    """See the module.

    Args:
        group: of the processes.
        device: of the rows.
        chunk_tokens: the most tokens of one chunk on any process.
        capacity: the most copies, and slots, that a process receives, as a multiple of its even share; None is the worst case,
            everything to one process. More than that stops the device with an assertion before anything is overwritten. Token
            rounding takes the worst case.

    Raises:
        ValueError: it cannot run here, in one sentence.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, chunk_tokens: int, capacity: float | None = None) -> None:
        reason = why_not(device)
        if reason:
            raise ValueError(f'transport="symmetric_memory": {reason}')
        if capacity is not None and not capacity >= 1:
            raise ValueError(f"capacity={capacity}: must be at least 1, an even share")
        import torch.distributed._symmetric_memory as symmetric_memory

        if symmetric_memory.get_backend(device) != "NVSHMEM":
            symmetric_memory.set_backend("NVSHMEM")  # refused by torch once another backend's memory is in use
        self._init(group, chunk_tokens, capacity, torch.ops.symm_mem.all_to_all_vdev, symmetric_memory.empty)
        self._side = torch.cuda.Stream(device)

    def _init(self, group, chunk_tokens: int, capacity: float | None, operation: Operation, empty: Callable[..., torch.Tensor]) -> None:
        self.group, self.chunk_tokens, self.capacity = group, chunk_tokens, capacity
        self._operation, self._empty, self._side = operation, empty, None
        self._channels: dict[int, _Channel] = {}

    def announce(self, counts: torch.Tensor, *, num_tokens: int, slots_per_token: int | None, experts: int) -> Announced:
        processes, chunks, _ = counts.shape
        if -(-num_tokens // chunks) > self.chunk_tokens:
            raise ValueError(f"x has {num_tokens} tokens: must be at most max_tokens={self.chunk_tokens * chunks} with this transport")
        received = torch.empty_like(counts)
        with naming_failures(self.group):
            dist.all_to_all_single(received, counts, group=self.group)  # equal parts: nothing to read on the host
        most_here = min(experts, slots_per_token or experts)
        most_slots = slots_per_token or experts * processes
        rows = (
            (self.chunk_tokens * min(processes, most_slots), processes * self.chunk_tokens),
            (self.chunk_tokens * most_slots, processes * self.chunk_tokens * most_here),
        )
        if self.capacity is not None and slots_per_token is not None:
            rows = tuple((sent, min(come, math.ceil(self.capacity * sent))) for sent, come in rows)
            for kind, (_, come) in enumerate(rows):
                fits = (received[..., kind].sum(0) <= come).all()
                torch._assert_async(fits, "expert parallelism: more rows arrive than capacity allows")
        copies = [Leg(*rows[0], counts[:, chunk, 0], received[:, chunk, 0]) for chunk in range(chunks)]
        sent, come = rows[1]
        slots = Leg(chunks * sent, chunks * come, counts[..., 1].sum(1), received[..., 1].sum(1))
        return Announced(received, come, lambda: Legs(copies, slots, [come] * chunks, exact=False))

    def start(self, leg: Leg, rows: torch.Tensor, received: torch.Tensor | None = None) -> "_SideFlight":
        if received is None:
            received = rows.new_empty(leg.receive_rows, rows.shape[1])
        most, row_bytes = max(leg.send_rows, leg.receive_rows), rows.shape[1] * rows.element_size()
        channel = self._channel(*buffer_shape(most, row_bytes, dist.get_world_size(self.group)), rows.device)
        if self._side is None:
            self._exchange(channel, leg, rows, received)
            return _SideFlight(received, rows, None)
        # The flight keeps both tensors alive until the current stream has waited for this one.
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self._exchange(channel, leg, rows, received)
            event = self._side.record_event()
        return _SideFlight(received, rows, event)

    def room(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        return like.new_empty(rows, like.shape[1])

    def _exchange(self, channel: "_Channel", leg: Leg, rows: torch.Tensor, received: torch.Tensor) -> None:
        source, splits, offsets = channel.next_set()
        in_bytes, out_bytes = rows.view(torch.uint8), received.view(torch.uint8)
        source[: rows.shape[0], : in_bytes.shape[1]] = in_bytes
        splits.copy_(leg.sent)
        with naming_failures(self.group):
            self._operation(source, channel.out, splits, offsets, self.group.group_name)
        out_bytes.copy_(channel.out[: received.shape[0], : out_bytes.shape[1]])

    def _channel(self, rows: int, stride: int, device: torch.device) -> "_Channel":
        """The buffers for rows of ``stride`` bytes; made, or made larger, on first use, as a collective of the group."""
        channel = self._channels.get(stride)
        if channel is None or channel.out.shape[0] < rows:
            processes = dist.get_world_size(self.group)
            if channel is not None and self._side is not None:
                # Peers read these buffers: when all have waited here and joined the allocation, none does, and they may be freed.
                self._side.synchronize()

            def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
                return self._empty(*shape, dtype=dtype, device=device)

            def make_set() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                splits, offsets = make(processes, dtype=torch.int64), make(2, processes, dtype=torch.int64)
                return make(rows, stride, dtype=torch.uint8), splits, offsets

            channel = self._channels[stride] = _Channel(make(rows, stride, dtype=torch.uint8), [make_set(), make_set()])
        return channel


@dataclass
class _Channel:
    out: torch.Tensor
    """(rows, stride) bytes."""
    sets: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """Two of (rows to send, their splits (W,), what arrives: splits and offsets (2, W)), used in turn."""
    used: int = 0

    def next_set(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.used += 1
        return self.sets[self.used % 2]


class _SideFlight:
    def __init__(self, rows: torch.Tensor, sent: torch.Tensor, event: "torch.cuda.Event | None") -> None:
        self.rows, self._sent, self._event = rows, sent, event

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        self._sent = None
        return self.rows
