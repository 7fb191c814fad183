"""What travels between processes: the emulated kernels give PyTorch's bits, and PyTorch's are those of the definition."""

import contextlib

import pytest
import torch

from cute_runtime import emulator
from dispatch import plan, travel

SIZES = {"num_tokens": 700, "num_experts": 12, "processes": 4}


def spread(*, chunks: int, ordered: bool, dtype: torch.dtype) -> travel.Spread:
    """Three slots a token with sentinels on both sides, one process without slots; shuffled with tokens that are none if not ordered."""
    generator = torch.Generator().manual_seed(chunks)
    tokens, k = SIZES["num_tokens"], 3
    expert = torch.randint(-1, 14, (tokens * k,), generator=generator).to(dtype)
    expert[(expert >= 6) & (expert < 9)] = 2
    if dtype == torch.int64:
        expert[::29] += 2**32
    if ordered:
        return travel.Spread(expert, None, slots_per_token=k, chunks=chunks, **SIZES)
    token = torch.arange(tokens * k)[torch.randperm(tokens * k, generator=generator)] // k
    token[5], token[7] = -1, tokens
    return travel.Spread(expert, token.to(dtype), slots_per_token=None, chunks=chunks, **SIZES)


def plans(of: travel.Spread) -> tuple:
    slot_pair, copy_pair = travel.pairs(of, backend="reference")
    sizes = {"num_tokens": of.num_tokens, "num_experts": of.processes * of.chunks}
    slots = plan(of.token_index, slot_pair, **sizes, slots_per_token=of.slots_per_token)
    return slots, plan(None, copy_pair, **sizes, slots_per_token=of.processes)


@contextlib.contextmanager
def kernels(seed: int = 0):
    """The kernels on a CPU, new tensors poisoned."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
    try:
        with emulator.emulation(seed=seed) as statistics:
            yield statistics
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
def test_emulated_pairs_have_pytorchs_bits(chunks: int, dtype: torch.dtype):
    of = spread(chunks=chunks, ordered=True, dtype=dtype)
    want = travel.pairs(of, backend="reference")
    with kernels() as statistics:
        got = travel.pairs(of, backend="hopper")
    assert len(statistics) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_pairs_are_those_of_the_definition():
    of = travel.Spread(torch.tensor([0, 1, 3, 9, 2, 0]), None, 3, 4, 2, processes=2, chunks=2)
    slot_pair, copy_pair = travel.pairs(of)  # tokens 1 and 2 are the second chunk
    assert slot_pair.tolist() == [0, 0, 3, -1, 3, 1]
    assert copy_pair.tolist() == [0, -1, -1, 3, 2, 3]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("chunks", "dtype"), [(1, torch.int32), (3, torch.int64)], ids=str)
def test_emulated_labels_have_pytorchs_bits(chunks: int, dtype: torch.dtype, ordered: bool):
    of = spread(chunks=chunks, ordered=ordered, dtype=dtype)
    slots, copies = plans(of)
    score = torch.rand(of.expert_index.shape[0], generator=torch.Generator().manual_seed(1))
    want = travel.labels(of, score, slots, copies, backend="reference")
    with kernels() as statistics:
        got = travel.labels(of, score, slots, copies, backend="hopper")
    assert len(statistics) == 1
    used = slots.offsets[-1]
    assert 0 < used < len(score)
    assert torch.equal(got[:used], want[:used])


@pytest.mark.parametrize("padding", [0, 5])
def test_emulated_arrivals_have_pytorchs_bits(padding: int):
    """Two chunks from three processes, which came process by process, one run empty; places of padding behind each chunk."""
    counts = torch.tensor([[300, 7, 211], [0, 90, 41]])  # (chunk, process)
    came = counts.t().flatten().cumsum(0).view(3, 2).t()
    lengths = torch.cat([counts, torch.full((2, 1), padding)], dim=1)
    ends = lengths.flatten().cumsum(0)
    shift = torch.cat([came, torch.zeros(2, 1, dtype=torch.int64)], dim=1).flatten() - ends
    first = torch.tensor([0, 250, 260, -1, 0, 0, 70, -1])
    arrivals = travel.Arrivals(ends.int(), shift.int(), first.int())
    labels = torch.randint(0, 60, (649, 3), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    want = travel.unpack(labels, arrivals, int(ends[-1]), 8, torch.float32, backend="reference")
    with kernels() as statistics:
        got = travel.unpack(labels, arrivals, int(ends[-1]), 8, torch.float32, backend="hopper")
    assert len(statistics) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    token, expert, score, at = want
    second = 518 + padding  # the second chunk's first place: of process 1, behind its 7 of the first chunk and all 300 of process 0
    assert (token[second], expert[second], at[second]) == (labels[307, 0], labels[307, 1], 307)
    assert torch.equal(score[second : second + 1].view(torch.int32), labels[307:308, 2])
    if padding:
        assert (expert[518:523] == 8).all()
        assert (at[518:523] == 649).all()
        assert not score[518:523].any()


@pytest.mark.gpu
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("chunks", "dtype"), [(1, torch.int32), (4, torch.int64)], ids=str)
def test_on_a_gpu_all_steps_have_pytorchs_bits(chunks: int, dtype: torch.dtype, ordered: bool):
    of = spread(chunks=chunks, ordered=ordered, dtype=dtype)
    of = of._replace(**{name: getattr(of, name).cuda() for name in ("expert_index", "token_index") if getattr(of, name) is not None})
    for got, want in zip(*(travel.pairs(of, backend=backend) for backend in ("hopper", "reference")), strict=True):
        assert torch.equal(got, want)
    slots, copies = plans(of)
    score = torch.rand(of.expert_index.shape[0], device="cuda")
    got, want = (travel.labels(of, score, slots, copies, backend=backend) for backend in ("hopper", "reference"))
    used = int(slots.offsets[-1])
    assert torch.equal(got[:used], want[:used])
    runs = torch.tensor([[used // 3, used, used + 9], [5, 5, 5], [0, 40, -1]], dtype=torch.int32, device="cuda")
    arrivals = travel.Arrivals(runs[0], torch.where(runs[1] > 0, 0, runs[1]), runs[2])
    for got, want in zip(
        *(travel.unpack(want, arrivals, used + 9, 3, torch.float32, backend=backend) for backend in ("hopper", "reference")), strict=True
    ):
        assert torch.equal(got, want)


def test_what_is_empty_travels_as_nothing():
    of = travel.Spread(torch.empty(0, dtype=torch.int32), None, 0, 4, 2, processes=2, chunks=3)
    slot_pair, copy_pair = travel.pairs(of)
    assert slot_pair.shape == copy_pair.shape == (0,)
    none = torch.zeros(1, dtype=torch.int32)
    token, expert, _, at = travel.unpack(none.new_zeros(0, 3), travel.Arrivals(none + 2, none, none - 1), 2, 4, torch.float32)
    assert (token.tolist(), expert.tolist(), at.tolist()) == ([0, 0], [4, 4], [0, 0])
