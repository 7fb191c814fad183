"""Index arithmetic of tokens that travel to the processes which have their experts: kernels/travel.py and the same in PyTorch.

Notation: W processes, each with E/W neighbouring experts; T tokens, R slots, K slots a token, C chunks of tokens. Sizes are those of
`chunk_of`: token t is of chunk ``((t + 1) C - 1) // T``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import cute_runtime
from dispatch.chunk_counts import DTYPE_NAME, MAX_SIZE
from dispatch.kernels import variants
from dispatch.operators import check_backend
from dispatch.types import DispatchPlan


class Spread(NamedTuple):
    """Whose experts the slots of a routing choose."""

    expert_index: torch.Tensor
    """(R,) int32 or int64; sentinels outside [0, E)."""
    token_index: torch.Tensor | None
    """(R,), or None where slots_per_token says it all."""
    num_tokens: int
    num_experts: int
    slots_per_token: int | None
    processes: int
    chunks: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.num_tokens, self.num_experts, self.slots_per_token or 0, self.processes, self.chunks

    def uses_kernel(self, backend: str) -> bool:
        """``backend`` is "hopper", "reference" or, the kernels where they can, "auto"."""
        check_backend(backend)
        most = max(self.expert_index.shape[0], self.num_tokens * max(self.processes, self.chunks))
        fits = self.expert_index.shape[0] > 0 and self.num_tokens > 0 and most <= MAX_SIZE
        return fits and (backend == "hopper" or (backend == "auto" and cute_runtime.is_supported_device(self.expert_index.device)))


def pairs(spread: Spread, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be planned, int32: ``slot_pair`` (R,), ``process * C + chunk`` of each slot, and ``copy_pair`` (T * W,),
    ``chunk * W + w`` of each token and process w that has one of its experts; -1 for what does not travel.

    Worked example, W=2, E=4, C=1, T=2, K=2, 9 is a sentinel::

        expert_index = [0, 1, 3, 9]     slot_pair = [0, 0, 1, -1]     copy_pair = [0, -1, -1, 1]
    """
    expert, tokens, processes, chunks = spread.expert_index, spread.num_tokens, spread.processes, spread.chunks
    if spread.slots_per_token is not None and spread.uses_kernel(backend):
        expert = expert.contiguous()
        slot_pair, copy_pair = (expert.new_empty(size, dtype=torch.int32) for size in (expert.shape[0], tokens * processes))
        cute_runtime.check_launch(alignment=4, expert_index=expert)
        with cute_runtime.on_device(expert.device):
            _load("pairs", expert.dtype)(expert, slot_pair, copy_pair, *spread.sizes)
        return slot_pair, copy_pair
    token, live, owner = _owners(spread)
    slot_pair = copy_pair = owner
    if chunks > 1:
        chunk = chunk_of(token, tokens, chunks)
        slot_pair, copy_pair = owner * chunks + chunk, chunk * processes + owner
    # A pair that no slot names is a sentinel; slots with the same one write the same, sentinels into a place behind the last.
    cell = torch.where(live, torch.add(owner, token, alpha=processes), tokens * processes).long()
    travels = torch.full((tokens * processes + 1,), -1, dtype=torch.int32, device=expert.device)
    return torch.where(live, slot_pair, -1).int(), travels.scatter_(0, cell, copy_pair.int())[:-1]


def labels(spread: Spread, score: torch.Tensor, slots: DispatchPlan, copies: DispatchPlan, *, backend: str = "auto") -> torch.Tensor:
    """(R, 2 + s) int32, what travels of each row of ``slots``: which of the copies of its chunk and process it belongs to, its expert
    counted from the process's first, and the s words of its score. Anything in the tail.

    Args:
        score: (R,) of 4 or 8 bytes.
        slots, copies: plans of what `pairs` returns.
    """
    expert, (tokens, experts, _, processes, chunks) = spread.expert_index, spread.sizes
    words = score.contiguous().unsqueeze(1).view(torch.int32)
    if words.shape[1] == 1 and spread.uses_kernel(backend):
        expert, token = expert.contiguous(), None
        if spread.slots_per_token is None:
            token = spread.token_index.to(expert.dtype).contiguous()
        rows = expert.new_empty(expert.shape[0], 3, dtype=torch.int32)
        cute_runtime.check_launch(alignment=4, expert_index=expert, token_index=token, score=words)
        with cute_runtime.on_device(expert.device):
            kernel = _load("labels", expert.dtype, token is None)
            kernel(expert, token, words.squeeze(1), slots.row_to_slot, copies.slot_to_row, copies.offsets, rows, *spread.sizes)
        return rows
    if tokens == 0:
        return words.new_zeros(words.shape[0], 2 + words.shape[1])
    slot = slots.row_to_slot.clamp(min=0)
    token, live, owner = (part[slot] for part in _owners(spread))
    own = experts // processes
    owner, token = torch.where(live, owner, 0), token.clamp(0, tokens - 1)
    pair = chunk_of(token, tokens, chunks) * processes + owner
    position = copies.slot_to_row[torch.add(owner, token, alpha=processes)] - copies.offsets[pair]
    return torch.cat([torch.stack([position, (expert[slot] - owner * own).int()], dim=1), words[slot]], dim=1)


class Arrivals(NamedTuple):
    """Where the slots that come belong, known before they are here: n runs of neighbouring places, one after the other."""

    ends: torch.Tensor
    """(n,) int32: where each run of places ends."""
    shift: torch.Tensor
    """(n,) int32: what takes such a place to its slot's label."""
    first: torch.Tensor
    """(n,) int32: the row that the positions of the run's labels count from; -1 for padding."""


def unpack(
    labels: torch.Tensor, arrivals: Arrivals, places: int, num_experts: int, score: torch.dtype, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of labels (N, 2 + s) that have come, of each of M places: token and expert, int32, score, and ``at``, int32, which label it has.

    The runs of ``arrivals`` hold all M places. A place of padding has token 0, expert ``num_experts``, a score of 0, and is at N.
    """
    check_backend(backend)
    device = labels.device
    if labels.shape[0] == 0 or places == 0:
        token, at = labels.new_zeros(places), labels.new_full((places,), labels.shape[0])
        return token, torch.full_like(token, num_experts), torch.zeros(places, dtype=score, device=device), at
    if labels.shape[1] == 3 and (backend == "hopper" or (backend == "auto" and cute_runtime.is_supported_device(device))):
        token, expert, bits, at = labels.new_empty(4, places).unbind()
        cute_runtime.check_launch(alignment=4, labels=labels)
        with cute_runtime.on_device(device):
            _load("arrivals")(labels, *arrivals, token, expert, bits, at, num_experts)
        return token, expert, bits.view(score), at
    place = torch.arange(places, dtype=torch.int32, device=device)
    run = torch.searchsorted(arrivals.ends, place, right=True)
    first, at = arrivals.first[run], place + arrivals.shift[run]
    mine, real = labels[at.clamp(0, labels.shape[0] - 1)], first >= 0
    words = mine[:, 2:].contiguous().view(score).squeeze(1)
    token, expert = torch.where(real, first + mine[:, 0], 0), torch.where(real, mine[:, 1], num_experts)
    return token, expert, torch.where(real, words, 0.0), torch.where(real, at, labels.shape[0])


def chunk_of(token: torch.Tensor, num_tokens: int, chunks: int) -> torch.Tensor:
    """The chunk that a token is of; int64, so that nothing overflows."""
    return ((token.long() + 1) * chunks - 1) // max(num_tokens, 1)


def _owners(spread: Spread) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, whether it travels, and the process of each slot."""
    expert, token = spread.expert_index, spread.token_index
    live = (expert >= 0) & (expert < spread.num_experts)
    if spread.slots_per_token is not None:
        token = torch.arange(expert.shape[0], dtype=expert.dtype, device=expert.device) // spread.slots_per_token
    else:
        live = live & (token >= 0) & (token < spread.num_tokens)
    return token, live, expert // (spread.num_experts // spread.processes)


@functools.cache
def _load(step: str, index: torch.dtype = torch.int32, ordered: bool = True) -> Callable[..., None]:
    return cute_runtime.load(variants.travel(step=step, index=DTYPE_NAME[index], ordered=ordered))
