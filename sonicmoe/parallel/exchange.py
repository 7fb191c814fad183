"""A use of a layer on its way to the experts and back, differentiable.

Each journey is two autograd functions, the start and the end, so that other work can be put between them. What passes from one to the
other is in the `Trip`; autograd sees empty tensors, which keep the order. Backward walks the same stations the other way: the end of a
journey starts the gradient's, and its start waits for it::

    forward    depart -> unpack, arrive    experts    give_back -> land        arrive, experts and give_back for each chunk
    backward   depart <- unpack, arrive    experts    give_back <- land

Notation: W processes, C chunks of tokens, T tokens, H hidden size, R slots of the routing; of a chunk this process sends S copies and
receives N; of all chunks it sends Q slots and receives M.
"""

from dataclasses import dataclass, field

import torch
from torch.autograd.function import once_differentiable

import dispatch
from dispatch import DispatchPlan, travel
from routing import Routing
from sonicmoe.parallel.plan import Sends
from sonicmoe.parallel.transport import Announced, Flight, Legs, Transport


@dataclass
class Trip:
    """Everything about one use of a layer that its stations need."""

    transport: Transport
    sends: Sends
    legs: Legs
    arrivals: travel.Arrivals
    labels: torch.Tensor
    """(Q, 2 + s) int32: what travels of the slots."""
    tokens: list[torch.Tensor]
    """(S,) int32 of each chunk: the copies' tokens; any token for padding."""
    landing: DispatchPlan
    """Of the copies as they land, chunk after chunk: sums each token's."""
    experts: int
    """Those of this process."""
    flights: dict[tuple[str, int], Flight] = field(default_factory=dict)
    """What is under way, from its start to its end; kept no longer, as it would keep the graph alive."""
    rooms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Where what is under way lands, if the chunks' rows are to lie side by side."""

    def start_back(self, kind: str, chunk: int, rows: torch.Tensor) -> None:
        """Send a chunk's rows (N, H) to where its tokens are; all chunks' land in one room, in the order of ``tokens``."""
        if kind not in self.rooms:
            self.rooms[kind] = self.transport.room(rows, sum(token.shape[0] for token in self.tokens))
        leg = self.legs.copies[chunk].back()
        begin = sum(token.shape[0] for token in self.tokens[:chunk])
        room = self.rooms[kind][begin : begin + leg.receive_rows]
        self.flights[kind, chunk] = self.transport.start(leg, rows.contiguous(), room)

    def landed(self, kind: str) -> torch.Tensor:
        """(T, H): the sums of what all chunks' `start_back` has sent."""
        for chunk in range(len(self.tokens)):
            self.flights.pop((kind, chunk)).wait()
        return dispatch.gather_sum(self.rooms.pop(kind), None, self.landing, any_rows=True)

    def start_copies(self, kind: str, chunk: int, x: torch.Tensor) -> None:
        """Send a chunk's copies of x (T, H)."""
        token = self.tokens[chunk]
        rows = x.index_select(0, token) if x.shape[0] else x.new_zeros(token.shape[0], x.shape[1])
        self.flights[kind, chunk] = self.transport.start(self.legs.copies[chunk], rows)


@torch.no_grad()
def arrivals(announced: Announced) -> travel.Arrivals:
    """Of the sizes that the others have announced: for each chunk a run of places for each process, and one of padding where
    their number is fixed."""
    copies, slots = announced.received.permute(2, 1, 0)  # (C, W)
    came = announced.received[..., 1].flatten().cumsum(0, dtype=torch.int32).view(-1, slots.shape[0]).t()
    first = copies.cumsum(1, dtype=torch.int32) - copies
    if announced.places is not None:
        padding = (announced.places - slots.sum(1, keepdim=True)).int()
        slots, came, first = (
            torch.cat(parts, dim=1) for parts in ((slots, padding), (came, padding), (first, torch.full_like(padding, -1)))
        )
    ends = slots.flatten().cumsum(0, dtype=torch.int32)
    shift = came.flatten() - ends  # of a run and its labels, the ends differ by as much as the begins
    return travel.Arrivals(ends, shift, first.flatten())


@torch.no_grad()
def pack(
    sends: Sends, labels: torch.Tensor, legs: Legs, arriving: travel.Arrivals, chunks: int, transport: Transport, experts: int
) -> Trip:
    """The trip, without looking at sizes that are on the device."""
    copies, processes = sends.copies, sends.copies.slots_per_token
    sizes = [leg.send_rows for leg in legs.copies]
    if legs.exact:
        tokens = list(copies.row_to_token[: sum(sizes)].split(sizes))
        return Trip(transport, sends, legs, arriving, labels[: legs.slots.send_rows], tokens, copies, experts)
    # Each chunk's copies begin at a place that the host does not know, and land at one that it does.
    (rows,) = set(sizes)
    begins = copies.offsets[:-1:processes]
    at = torch.arange(rows, device=begins.device) + begins.unsqueeze(1)
    candidates = copies.row_to_token.shape[0]
    tokens = copies.row_to_token[at.clamp_(max=max(candidates - 1, 0))].clamp(min=0) if candidates else torch.zeros_like(at).int()
    landed = copies.slot_to_row
    if chunks > 1 and candidates:
        moved = torch.arange(0, rows * chunks, rows, device=begins.device) - begins
        chunk = torch.searchsorted(begins[1:].contiguous(), landed, right=True)
        landed = torch.where(landed >= 0, landed + moved[chunk], -1).int()
    padded = labels.new_zeros(legs.slots.send_rows, labels.shape[1])
    most = min(padded.shape[0], labels.shape[0])
    padded[:most] = labels[:most]
    landing = copies._replace(slot_to_row=landed)
    return Trip(transport, sends, legs, arriving, padded, list(tokens.view(chunks, rows)), landing, experts)


def depart(x: torch.Tensor, score: torch.Tensor, trip: Trip) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Start the routing's score (R,), with the other labels, and each chunk's copies of x (T, H); the results are for `unpack` and, one
    for each chunk, for `arrive`."""
    labels, *copies = _Depart.apply(x, score, trip)
    return labels, copies


def unpack(score: torch.Tensor, trip: Trip) -> list[Routing]:
    """The routing of each chunk's N rows to the experts here, with sentinels for padding."""
    chunks = len(trip.tokens)
    parts = _Unpack.apply(score, trip)
    rows = [leg.receive_rows for leg in trip.legs.copies]
    in_chunks = zip(parts[chunks : 2 * chunks], parts[2 * chunks :], parts[:chunks], rows, strict=True)
    return [Routing(token, expert, score, N, trip.experts, None) for token, expert, score, N in in_chunks]


def arrive(copies: torch.Tensor, trip: Trip, chunk: int) -> torch.Tensor:
    """What came of a chunk: rows (N, H)."""
    return _Arrive.apply(copies, trip, chunk)


def give_back(y: torch.Tensor, trip: Trip, chunk: int) -> torch.Tensor:
    """Start the experts' weighted sums y (N, H) of a chunk on their way back; the result is for `land`."""
    return _GiveBack.apply(y, trip, chunk)


def land(sums: list[torch.Tensor], trip: Trip) -> torch.Tensor:
    """(T, H): the sum of each token's copies, which the processes with its experts have sent."""
    return _Land.apply(trip, *sums)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, score, trip):
        ctx.trip, ctx.needs = trip, ctx.needs_input_grad[:2]
        # The labels first: they are small, and what depends on them can be computed while rows travel.
        trip.flights["labels", 0] = trip.transport.start(trip.legs.slots, trip.labels)
        for chunk in range(len(trip.tokens)):
            trip.start_copies("rows", chunk, x)
        copies = [x.new_empty(0) for _ in trip.tokens]
        labels = score.new_empty(0)
        ctx.mark_non_differentiable(*([] if ctx.needs[0] else copies), *([] if ctx.needs[1] else [labels]))
        return labels, *copies

    @staticmethod
    @once_differentiable
    def backward(ctx, *unused):
        trip, dx, dscore = ctx.trip, None, None
        if ctx.needs[1]:
            came, row = trip.flights.pop(("dscore", 0)).wait().squeeze(1), trip.sends.slots.slot_to_row
            came = came if came.shape[0] else came.new_zeros(1)
            dscore = came.index_select(0, row.clamp(min=0)).masked_fill_(row < 0, 0.0)
        if ctx.needs[0]:
            dx = trip.landed("drows")
        return dx, dscore, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, score, trip):
        ctx.trip, ctx.needed, ctx.like = trip, ctx.needs_input_grad[0], score.new_empty(0)
        ctx.set_materialize_grads(False)  # it would make zeros for the indices
        labels, sizes = trip.flights.pop(("labels", 0)).wait(), trip.legs.arriving
        token, expert, came, ctx.at = travel.unpack(labels, trip.arrivals, sum(sizes), trip.experts, score.dtype)
        outputs = [part.split(sizes) for part in (came, token, expert)]
        unneeded = [] if ctx.needed else outputs[0]
        ctx.mark_non_differentiable(*unneeded, *outputs[1], *outputs[2])
        return *outputs[0], *outputs[1], *outputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        trip = ctx.trip
        if not ctx.needed:
            return None, None
        chunks, leg, sizes = len(trip.tokens), trip.legs.slots.back(), trip.legs.arriving
        of_chunks = [ctx.like.new_zeros(size) if one is None else one for one, size in zip(gradients[:chunks], sizes, strict=True)]
        dscore = of_chunks[0] if chunks == 1 else torch.cat(of_chunks)
        if chunks > 1:  # else they lie by process, as they came; padding goes behind those that travel
            dscore = dscore.new_zeros(leg.send_rows + 1).index_put_((ctx.at,), dscore)[:-1]
        trip.flights["dscore", 0] = trip.transport.start(leg, dscore.unsqueeze(1).contiguous())
        return dscore.new_empty(0), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies, trip, chunk):
        ctx.trip, ctx.chunk = trip, chunk
        rows = trip.flights.pop(("rows", chunk)).wait()
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        ctx.trip.start_back("drows", ctx.chunk, drows)
        return drows.new_empty(0), None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, trip, chunk):
        ctx.trip, ctx.chunk = trip, chunk
        trip.start_back("sums", chunk, y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, unused):
        return ctx.trip.flights.pop(("dsums", ctx.chunk)).wait(), None, None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trip, *sums):
        ctx.trip = trip
        return trip.landed("sums")

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        trip = ctx.trip
        for chunk in reversed(range(len(trip.tokens))):  # the order in which their experts' gradients are computed
            trip.start_copies("dsums", chunk, dout)
        return None, *(dout.new_empty(0) for _ in trip.tokens)
