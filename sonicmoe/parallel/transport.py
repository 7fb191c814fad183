"""How rows get from process to process. Notation: W processes, C chunks of tokens.

A transport is told on the device how many rows go to each process, finds out how many come from each, and then moves rows along
these *legs*, in both directions and as often as asked. `AllToAll` reads the sizes on the host, once for all chunks, and works on
every backend of torch.distributed; `sonicmoe.parallel.symmetric.SymmetricMemory` leaves them on the device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from sonicmoe.parallel.failures import naming_failures


@dataclass(frozen=True)
class Leg:
    """One kind of rows of one chunk: how many this process sends to each process and receives from each.

    Rows lie by process in the senders' and receivers' buffers, without gaps.
    """

    sent: torch.Tensor
    """(W,) int64 on the device."""
    received: torch.Tensor
    """(W,) int64 on the device."""
    send_rows: int
    """Rows of the buffer to send, at least the sum of ``sent``."""
    receive_rows: int
    """Rows of the buffer to receive in, at least the sum of ``received``; what is behind that sum may hold anything."""
    host_sent: list[int] | None = None
    host_received: list[int] | None = None

    def back(self) -> "Leg":
        """The same rows in the other direction."""
        return Leg(self.received, self.sent, self.receive_rows, self.send_rows, self.host_received, self.host_sent)


class Flight(Protocol):
    """Rows on their way."""

    rows: torch.Tensor
    """Where they will be: (receive_rows, n), not to be read before `wait`."""

    def wait(self) -> torch.Tensor:
        """``rows``, in order on the current stream (on a CPU: when they have arrived)."""


class Transport(Protocol):
    """What `sonicmoe.parallel` asks of a transport. Every method is a collective of the group."""

    group: dist.ProcessGroup

    def legs(self, counts: torch.Tensor, *, num_tokens: int, slots_per_token: int | None, experts: int) -> list[tuple[Leg, Leg]]:
        """The legs of copies and of slots for each chunk.

        Args:
            counts: (C, W, 2) int64: copies and slots of each chunk to each process.
            num_tokens: T of this process.
            slots_per_token: K, or None where it differs from token to token.
            experts: those of one process.
        """

    def start(self, leg: Leg, rows: torch.Tensor) -> Flight:
        """Send ``rows`` (send_rows, n), contiguous, along a leg; they must stay as they are until `Flight.wait`."""


class AllToAll:
    """``torch.distributed.all_to_all_single`` with split sizes: NCCL on GPUs, gloo on CPUs. One host read for each use of a layer."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def legs(self, counts: torch.Tensor, *, num_tokens: int, slots_per_token: int | None, experts: int) -> list[tuple[Leg, Leg]]:
        chunks, _, kinds = counts.shape
        outgoing = counts.transpose(0, 1).contiguous()
        incoming = torch.empty_like(outgoing)
        with naming_failures(self.group):
            dist.all_to_all_single(incoming, outgoing, group=self.group)
            both = torch.stack([outgoing, incoming])  # (2, W, C, 2)
            sizes = both.permute(2, 3, 0, 1).tolist()  # the one host read
        device = both.permute(2, 3, 0, 1).contiguous()

        def leg(chunk: int, kind: int) -> Leg:
            sent, received = sizes[chunk][kind]
            return Leg(*device[chunk, kind], sum(sent), sum(received), sent, received)

        return [tuple(leg(chunk, kind) for kind in range(kinds)) for chunk in range(chunks)]

    def start(self, leg: Leg, rows: torch.Tensor) -> "_Work":
        received = rows.new_empty(leg.receive_rows, rows.shape[1])
        with naming_failures(self.group):
            work = dist.all_to_all_single(received, rows, leg.host_received, leg.host_sent, group=self.group, async_op=True)
        return _Work(received, rows, work, self.group)


class _Work:
    def __init__(self, rows: torch.Tensor, sent: torch.Tensor, work: dist.Work, group: dist.ProcessGroup) -> None:
        self.rows, self._sent, self._work, self._group = rows, sent, work, group

    def wait(self) -> torch.Tensor:
        with naming_failures(self._group):
            self._work.wait()
        self._sent = None
        return self.rows
