"""One chunk of tokens on its way to the experts and back, differentiable.

Each journey is two autograd functions, the start and the end, so that other work can be put between them; what they return in
between is not there yet. Backward walks the same four stations the other way: the end of a journey starts the gradient's, and its
start waits for it. As autograd runs what was recorded last first, gradients overlap with the same work as their tokens did::

    forward    depart -> arrive    experts    give_back -> land
    backward   depart <- arrive    experts    give_back <- land

Notation: W processes, T tokens of the chunk, H hidden size, R slots of the whole routing; this process sends S copies and Q slots
and receives N copies and M slots.
"""

from dataclasses import dataclass, field

import torch
from torch.autograd.function import once_differentiable

import dispatch
from dispatch import DispatchPlan
from routing import Routing
from sonicmoe.parallel.plan import Sends
from sonicmoe.parallel.transport import Flight, Leg, Transport


@dataclass
class Parcel:
    """Everything about a chunk that all its stations need."""

    transport: Transport
    copies: Leg
    slots: Leg
    num_tokens: int
    """T."""
    num_slots: int
    """R."""
    token: torch.Tensor
    """(S,) int64: each copy's token, counted from the chunk's first; T for a copy that is only padding."""
    slot: torch.Tensor
    """(Q,) int64: each travelling slot's place in the routing; R for padding."""
    labels: torch.Tensor
    """(Q, 2) int32: each slot's copy, counted from its destination's first, and its expert there."""
    plan: DispatchPlan
    """Of the S copies: sums each token's."""
    exact: bool
    """Whether there is no padding."""
    flights: dict[str, Flight] = field(default_factory=dict)
    """What is under way, from its start to its end; kept no longer, as it would keep the graph alive."""


def pack(sends: Sends, chunk: int, bounds: list[int], legs: tuple[Leg, Leg], transport: Transport) -> Parcel:
    """The parcel of one chunk, without looking at sizes that are on the device."""
    copies, slots = legs
    processes, device = copies.sent.shape[0], copies.sent.device
    first, num_tokens, num_slots = bounds[chunk], bounds[chunk + 1] - bounds[chunk], sends.slot.shape[0]
    exact = copies.host_sent is not None

    def own(offsets: torch.Tensor, length: int, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the chunk's entries are, and which of them are no padding."""
        at = torch.arange(length, device=device)
        return (at + offsets[chunk * processes]).clamp(max=max(num_slots - 1, 0)), at < total

    at, real = own(sends.copy_offsets, copies.send_rows, copies.sent.sum())
    token = torch.where(real, sends.copy_token[at] - first, num_tokens) if num_slots else at.new_full((copies.send_rows,), num_tokens)
    destination = torch.searchsorted(copies.sent.cumsum(0), torch.arange(copies.send_rows, device=device), right=True)
    at, real = own(sends.slot_offsets, slots.send_rows, slots.sent.sum())
    if num_slots:
        slot = torch.where(real, sends.slot[at], num_slots)
        labels = torch.stack([sends.position[at], sends.expert[at]], dim=1)
    else:
        slot, labels = at.new_full((slots.send_rows,), num_slots), at.new_zeros(slots.send_rows, 2, dtype=torch.int32)
    plan = dispatch.plan(token.int(), destination.int(), num_tokens=num_tokens, num_experts=processes)
    return Parcel(transport, copies, slots, num_tokens, num_slots, token, slot, labels, plan, exact)


def depart(x: torch.Tensor, score: torch.Tensor, parcel: Parcel) -> tuple[torch.Tensor, torch.Tensor]:
    """Start x (T, H) and the routing's score (R,) on their way; the results are for `arrive`."""
    return _Depart.apply(x, score, parcel)


def arrive(rows: torch.Tensor, score: torch.Tensor, parcel: Parcel, num_experts: int) -> tuple[torch.Tensor, Routing]:
    """What came: rows (N, H) and their routing to the ``num_experts`` experts here, with sentinels for padding."""
    rows, score, token_index, expert_index = _Arrive.apply(rows, score, parcel, num_experts)
    return rows, Routing(token_index, expert_index, score, rows.shape[0], num_experts, None)


def give_back(y: torch.Tensor, parcel: Parcel) -> torch.Tensor:
    """Start the experts' weighted sums y (N, H) on their way back; the result is for `land`."""
    return _GiveBack.apply(y, parcel)


def land(copies: torch.Tensor, parcel: Parcel) -> torch.Tensor:
    """(T, H): the sum of each token's copies, which the processes with its experts have sent."""
    return _Land.apply(copies, parcel)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, score, parcel):
        ctx.parcel, ctx.needs = parcel, ctx.needs_input_grad[:2]
        rows = _gather(x, parcel.token, parcel.exact)
        bits = _with_zero(score)[parcel.slot].unsqueeze(1).view(torch.int32)
        flight = parcel.transport.start(parcel.copies, rows)
        parcel.flights["rows"] = flight
        parcel.flights["slots"] = parcel.transport.start(parcel.slots, torch.cat([parcel.labels, bits], dim=1))
        placeholder = score.new_empty(parcel.slots.receive_rows)
        ctx.mark_non_differentiable(*(out for out, needed in zip((flight.rows, placeholder), ctx.needs, strict=True) if not needed))
        return flight.rows, placeholder

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dscore):
        parcel, dx, dscore = ctx.parcel, None, None
        if ctx.needs[0]:
            dx = dispatch.gather_sum(parcel.flights.pop("drows").wait(), None, parcel.plan)
        if ctx.needs[1]:
            came = parcel.flights.pop("dscore").wait().squeeze(1)
            dscore = came.new_zeros(parcel.num_slots + 1).scatter_(0, parcel.slot, came)[:-1]
        return dx, dscore, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, score, parcel, num_experts):
        ctx.parcel, ctx.needs = parcel, ctx.needs_input_grad[:2]
        rows, slots = parcel.flights.pop("rows").wait(), parcel.flights.pop("slots").wait()
        position, expert, bits = slots.split([1, 1, slots.shape[1] - 2], dim=1)
        # Rows and slots lie by the process that sent them; a slot's position counts from its process's first row.
        row_ends, slot_ends = parcel.copies.received.cumsum(0), parcel.slots.received.cumsum(0)
        source = torch.searchsorted(slot_ends, torch.arange(slots.shape[0], device=slots.device), right=True)
        row_begins = torch.cat([row_ends.new_zeros(1), row_ends])
        real = source < slot_ends.shape[0]
        token_index = torch.where(real, position.squeeze(1) + row_begins[source], rows.shape[0]).int()
        expert_index = torch.where(real, expert.squeeze(1), num_experts)
        arrived = torch.where(real, bits.contiguous().view(score.dtype).squeeze(1), 0.0)
        rows = rows.view_as(rows)
        unneeded = (out for out, needed in zip((rows, arrived), ctx.needs, strict=True) if not needed)
        ctx.mark_non_differentiable(token_index, expert_index, *unneeded)
        return rows, arrived, token_index, expert_index

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dscore, *unused):
        parcel = ctx.parcel
        if ctx.needs[0]:
            parcel.flights["drows"] = parcel.transport.start(parcel.copies.back(), drows.contiguous())
        if ctx.needs[1]:
            parcel.flights["dscore"] = parcel.transport.start(parcel.slots.back(), dscore.unsqueeze(1).contiguous())
        return drows, dscore, None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, parcel):
        ctx.parcel = parcel
        flight = parcel.flights["sums"] = parcel.transport.start(parcel.copies.back(), y)
        return flight.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, dcopies):
        return ctx.parcel.flights.pop("dsums").wait(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies, parcel):
        ctx.parcel = parcel
        return dispatch.gather_sum(parcel.flights.pop("sums").wait(), None, parcel.plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        parcel = ctx.parcel
        rows = _gather(dout, parcel.token, parcel.exact)
        parcel.flights["dsums"] = parcel.transport.start(parcel.copies, rows)
        return rows, None


def _gather(x: torch.Tensor, token: torch.Tensor, exact: bool) -> torch.Tensor:
    """x[token]; padding is any row."""
    if not x.shape[0]:
        return x.new_zeros(token.shape[0], x.shape[1])
    return x.index_select(0, token if exact else token.clamp(max=x.shape[0] - 1))


def _with_zero(score: torch.Tensor) -> torch.Tensor:
    return torch.cat([score, score.new_zeros(1)])
