"""When a process of the group dies, the others say which one, as far as torch knows.

A collective that fails tells at best an address ("Connection closed by peer"), often only that time is up. The processes that are
left then call the roll through the store that the group was made with, which every process can reach but the dead ones: whoever
has not answered after a few seconds is named.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

ROLL_CALL_S = 5.0
"""How long the roll call waits for the other processes; their collectives fail within moments of each other, or not at all."""

_POLL_S = 0.1


class PeerError(RuntimeError):
    """A collective failed; says on which rank, and which ranks were not heard of afterwards."""

    def __init__(self, message: str, missing: list[int]) -> None:
        super().__init__(message)
        self.missing = missing
        """Global ranks that did not answer the roll call."""


@contextmanager
def naming_failures(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Turn the failure of a collective within the block into a PeerError that names the ranks which are gone."""
    try:
        yield
    except PeerError:
        raise
    except RuntimeError as error:  # torch.distributed's own errors derive from it, and gloo raises it as it is
        raise _peer_error(error, group) from error


def _peer_error(error: RuntimeError, group: dist.ProcessGroup | None) -> PeerError:
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    rank, first_line = dist.get_rank(), (str(error).strip().splitlines() or [type(error).__name__])[0]
    missing = _roll_call(rank, ranks)
    if missing:
        who = f"rank {missing[0]} was" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} were"
        found = f"{who} not heard of within {ROLL_CALL_S:.0f} s and may have died"
    else:
        found = "every rank still answers, so that a slow rank or the network is the likelier cause"
    return PeerError(f"rank {rank}: a collective of ranks {_spans(ranks)} failed: {found} ({first_line})", missing)


def _roll_call(rank: int, ranks: list[int]) -> list[int]:
    """The ranks that did not answer; where the store itself is gone, the rank that hosts it (0, unless torchrun's agent does)."""
    deadline = time.monotonic() + ROLL_CALL_S
    missing = [other for other in ranks if other != rank]
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=ROLL_CALL_S))
        store.set(_key(rank), "here")
        while missing and time.monotonic() < deadline:
            missing = [other for other in missing if not store.check([_key(other)])]
            if missing:
                time.sleep(_POLL_S)
    except RuntimeError:
        return [0] if 0 in missing else missing
    return missing


def _key(rank: int) -> str:
    return f"sonicmoe/roll_call/{rank}"


def _spans(ranks: list[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2 else ", ".join(map(str, ranks))
