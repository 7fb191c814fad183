"""How rows get from process to process. Notation: W processes, C chunks of tokens.

A transport is told on the device how many rows go to each process, finds out how many come from each, and then moves rows along
*legs*, in both directions and as often as asked. `AllToAll` reads the sizes on the host, once for all chunks, and works on every
backend of torch.distributed; `sonicmoe.parallel.symmetric.SymmetricMemory` leaves them on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from sonicmoe.parallel.failures import naming_failures


@dataclass(frozen=True)
class Leg:
    """One kind of rows: how many this process sends to each process and receives from each.

    Rows lie by process in the senders' and receivers' buffers, without gaps.
    """

    send_rows: int
    """Rows of the buffer to send, at least those that travel."""
    receive_rows: int
    """Rows of the buffer to receive in, at least those that come; what is behind them may hold anything."""
    sent: torch.Tensor | list[int]
    """How many to each of the W processes: numbers, or int32 on the device."""
    received: torch.Tensor | list[int]
    """How many from each."""

    def back(self) -> "Leg":
        """The same rows in the other direction."""
        return Leg(self.receive_rows, self.send_rows, self.received, self.sent)


@dataclass(frozen=True)
class Legs:
    """Of one use of a layer."""

    copies: list[Leg]
    """Of each chunk."""
    slots: Leg
    """Of all chunks together."""
    arriving: list[int]
    """How many places of slots each chunk has here, at least as many as come."""
    exact: bool
    """Whether every number of rows is that of the rows which travel: there is no padding."""


@dataclass(frozen=True)
class Announced:
    """The sizes of one use of a layer, on their way to the other processes."""

    received: torch.Tensor
    """(W, C, 2) int32 on the device: copies and slots from each process in each chunk."""
    places: int | None
    """Of slots for each chunk here, if there are as many whatever comes."""
    legs: Callable[[], Legs]
    """Waits for them where the host has to know them: what is launched before, runs meanwhile."""


class Flight(Protocol):
    """Rows on their way."""

    rows: torch.Tensor
    """Where they will be: (receive_rows, n), not to be read before `wait`."""

    def wait(self) -> torch.Tensor:
        """``rows``, in order on the current stream (on a CPU: when they have arrived)."""


class Transport(Protocol):
    """What `sonicmoe.parallel` asks of a transport."""

    group: dist.ProcessGroup

    def announce(self, counts: torch.Tensor, *, num_tokens: int, slots_per_token: int | None, experts: int) -> Announced:
        """Tell every process what it gets. A collective of the group.

        Args:
            counts: (W, C, 2) int32: copies and slots to each process in each chunk.
            num_tokens: T of this process.
            slots_per_token: K, or None where it differs from token to token.
            experts: those of one process.
        """

    def start(self, leg: Leg, rows: torch.Tensor, received: torch.Tensor | None = None) -> Flight:
        """Send ``rows`` (send_rows, n), contiguous, along a leg; they must stay as they are until `Flight.wait`. A collective of the group.

        ``received`` (receive_rows, n), contiguous, is where they land, or None for a place of their own.
        """

    def room(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """(rows, n) for rows that are to land side by side, uninitialised, of the dtype and width of ``like`` (any, n)."""


class AllToAll:
    """``torch.distributed.all_to_all_single`` with split sizes: NCCL on GPUs, gloo on CPUs. One host read for each use of a layer."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def announce(self, counts: torch.Tensor, *, num_tokens: int, slots_per_token: int | None, experts: int) -> Announced:
        both = counts.new_empty(2, *counts.shape)
        both[0] = counts
        with naming_failures(self.group):
            dist.all_to_all_single(both[1], both[0], group=self.group)
            read = _reading(both)

        def legs() -> Legs:
            with naming_failures(self.group):
                sizes = read().tolist()  # [sent, received][process][chunk][copies, slots]
            sent, received = ([[[of[chunk][kind] for of in way] for chunk in range(counts.shape[1])] for kind in (0, 1)] for way in sizes)
            copies = [Leg(sum(to), sum(come), to, come) for to, come in zip(sent[0], received[0], strict=True)]
            to, come = ([sum(process) for process in zip(*way[1], strict=True)] for way in (sent, received))
            return Legs(copies, Leg(sum(to), sum(come), to, come), [sum(chunk) for chunk in received[1]], exact=True)

        return Announced(both[1], None, legs)

    def start(self, leg: Leg, rows: torch.Tensor, received: torch.Tensor | None = None) -> "_Work":
        if received is None:
            received = rows.new_empty(leg.receive_rows, rows.shape[1])
        with naming_failures(self.group):
            work = dist.all_to_all_single(received, rows, leg.received, leg.sent, group=self.group, async_op=True)
        return _Work(received, rows, work, self.group)

    def room(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        return like.new_empty(rows, like.shape[1])


def _reading(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start a copy to the host; the returned function waits for it, and not for what is launched after it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> torch.Tensor:
        event.synchronize()
        return copy

    return read


class _Work:
    def __init__(self, rows: torch.Tensor, sent: torch.Tensor, work: dist.Work, group: dist.ProcessGroup) -> None:
        self.rows, self._sent, self._work, self._group = rows, sent, work, group

    def wait(self) -> torch.Tensor:
        with naming_failures(self._group):
            self._work.wait()
        self._sent = None
        return self.rows
