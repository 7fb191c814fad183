"""Expert parallelism on four processes of this machine, with gloo. Groups of 1 and 2 are parts of the same four."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from routing import Routing
from sonicmoe import accuracy
from sonicmoe.cases import DTYPES
from sonicmoe.parallel import symmetric
from sonicmoe.parallel.plan import plan_sends
from sonicmoe.tests import parallel_checks as checks
from sonicmoe.tests.local_group import LocalGroup, RankError


@pytest.fixture(scope="module")
def ranks():
    with LocalGroup(4, timeout_s=30) as group:
        yield group


def test_plan_of_the_docstring():
    expert_index = torch.tensor([0, 1, 2, 0, 3, 9], dtype=torch.int32)
    routing = Routing(torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32), expert_index, torch.ones(6), 3, 4, 2)
    sends = plan_sends(routing, processes=2, chunks=1)
    assert sends.slots.row_to_slot.tolist() == [0, 1, 3, 2, 4, -1]
    assert sends.copies.row_to_token[:4].tolist() == [0, 1, 1, 2]
    assert sends.labels(routing.score)[:5, :2].tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [1, 1]]
    assert sends.counts(1).tolist() == [[[2, 3]], [[2, 2]]]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("slots_per_token", [3, None], ids=["sorted by token", "in any order"])
def test_plan_sends_each_token_once_to_each_process(slots_per_token: int | None, chunks: int):
    """Against sets of pairs, with sentinels, chunks of unequal size and processes that get nothing."""
    T, E, K, W = 23, 12, 3, 4
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(T * K, dtype=torch.int32) // K
    expert = torch.randint(0, E + 2, (T * K,), generator=generator, dtype=torch.int32)
    expert[(expert >= 6) & (expert < 9)] = -1  # process 2 gets nothing
    if slots_per_token is None:
        order = torch.randperm(T * K, generator=generator)
        token, expert = token[order], expert[order]
    score = torch.rand(T * K, generator=generator)
    routing = Routing(token, expert, score, T, E, slots_per_token)
    sends = plan_sends(routing, processes=W, chunks=chunks)
    counts, labels = sends.counts(chunks), sends.labels(score)
    bounds = [T * chunk // chunks for chunk in range(chunks + 1)]  # sizes differ by at most one
    assert bounds == ([0, 7, 15, 23] if chunks == 3 else [0, 23])
    for chunk in range(chunks):
        for process in range(W):
            begin, end = sends.slots.offsets[process * chunks + chunk :][:2].tolist()
            slots = sends.slots.row_to_slot[begin:end]
            wanted = [
                slot
                for slot in range(T * K)
                if bounds[chunk] <= token[slot] < bounds[chunk + 1] and 0 <= expert[slot] < E and expert[slot] // 3 == process
            ]
            assert sorted(slots.tolist()) == wanted
            first, last = sends.copies.offsets[chunk * W + process :][:2].tolist()
            copies = sends.copies.row_to_token[first:last]
            assert copies.tolist() == sorted(set(token[wanted].tolist()))
            assert counts[process, chunk].tolist() == [len(copies), len(slots)]
            assert torch.equal(copies[labels[begin:end, 0].long()], token[slots])
            assert torch.equal(labels[begin:end, 1], expert[slots] % 3)
            assert torch.equal(labels[begin:end, 2].contiguous().view(torch.float32), score[slots])


EQUALITY = {
    "1 rank": (1, [30], {}),
    "2 ranks": (2, [50, 40], {"bias": True}),
    "4 ranks": (4, [20, 25, 15, 30], {"chunks": 3, "gate_up_layout": "concatenated"}),
    "4 ranks, an activation without a gate": (4, [9, 9, 9, 9], {"activation": "gelu", "bias": True}),
    "ranks without tokens": (4, [0, 31, 0, 2], {"chunks": 2}),
    "no tokens at all": (4, [0, 0, 0, 0], {}),
    "fewer tokens than chunks": (4, [1, 2, 0, 1], {"chunks": 3}),
    "everyone to one rank": (4, [20, 25, 15, 30], {"everyone_to": 2, "k": 2}),
    "token rounding": (4, [20, 25, 15, 30], {"router": checks.ROUNDING, "chunks": 2}),
    "token rounding, renormalized sigmoid": (2, [50, 40], {"router": {**checks.ROUNDING, "scoring": "sigmoid", "renormalize": True}}),
    "sizes on the device": (4, [20, 25, 15, 30], {"capacity": None, "bias": True}),
    "sizes on the device, in chunks": (4, [0, 25, 1, 30], {"capacity": None, "chunks": 3}),
    "sizes on the device, everyone to one rank": (4, [9, 9, 9, 9], {"capacity": None, "everyone_to": 1, "k": 2}),
    "sizes on the device, token rounding": (2, [50, 40], {"capacity": None, "router": checks.ROUNDING, "chunks": 2}),
    "sizes on the device, bounded": (4, [20, 25, 15, 30], {"capacity": 1.5}),
    "token rounding that drops every row": (2, [3, 2], {"router": checks.ROUNDING}),
}


@pytest.mark.parametrize("name", EQUALITY)
def test_equals_the_single_device(ranks: LocalGroup, name: str):
    """Outputs and every gradient in float64, against the oracle on all tokens."""
    expert, split, options = EQUALITY[name]
    for found in ranks.run(checks.errors, expert, split, options):
        assert found.keys() >= {"o", "dx", "dw_up", "dw_down", "drouter"}
        assert all(whole <= 1e-13 and worst <= 1e-12 for whole, worst in found.values()), found


@pytest.mark.parametrize("split", [[20, 25, 15, 30], [1, 0, 4, 0]], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equals_the_single_device_in_low_precision(ranks: LocalGroup, dtype: str, split: list[int]):
    for found in ranks.run(checks.errors, 4, split, {"dtype": dtype, "bias": True, "chunks": 2}):
        limit = accuracy.THRESHOLDS[DTYPES[dtype]]
        assert all(whole <= limit.whole and worst <= limit.worst_block for whole, worst in found.values()), found


@pytest.mark.parametrize(
    ("mode", "tile_m", "ties"),
    [
        ("nearest", 8, False),
        ("nearest", 8, True),
        ("up", 16, True),
        ("down", 16, True),
        ("balanced", 8, False),
        ("stochastic", 8, False),
        ("up", 1, False),
    ],
)
def test_token_rounding_chooses_what_one_device_chooses(ranks: LocalGroup, mode: str, tile_m: int, ties: bool):
    assert all(ranks.run(checks.rounding_agrees, 4, [20, 0, 37, 7], mode, tile_m, ties))


@pytest.mark.parametrize("way", ["checkpoint", "tokens", "router"])
def test_gradients_that_are_asked_for_do_not_depend_on_the_others(ranks: LocalGroup, way: str):
    ranks.run(checks.gradients_agree, way)


def test_a_token_travels_once_to_each_rank(ranks: LocalGroup):
    for copies, pairs in ranks.run(checks.copies_and_pairs, 2):
        assert copies == pairs
        assert copies < 40 * checks.SIZES.K


@pytest.mark.parametrize(("chunks", "operators"), [(1, (20, 11)), (2, (26, 19)), (4, (34, 29))])
def test_a_pass_launches_few_operators(ranks: LocalGroup, chunks: int, operators: tuple[int, int]):
    """docs/expert_parallel.md has the numbers; of the two passes a chunk's stand-in for the experts has three."""
    assert ranks.run(checks.operators_of_a_pass, chunks) == [operators] * 4


def test_shared_expert_runs_while_tokens_travel(ranks: LocalGroup):
    for order in ranks.run(checks.shared_expert_runs_meanwhile):
        assert order[:3] == ["start", "start", "shared"]


@pytest.mark.parametrize("split", [[8, 8], [12, 5], [7, 0]], ids=str)
def test_losses_average_to_the_single_device(ranks: LocalGroup, split: list[int]):
    ranks.run(checks.losses_average_to_the_single_device, split)


def test_style_gives_shards_under_the_same_names(ranks: LocalGroup):
    ranks.run(checks.style_equals_function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_trains_with_fsdp_as_one_device_does(ranks: LocalGroup, dtype: torch.dtype):
    ranks.run(checks.trains_with_fsdp, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_learner_of_two_replicas_learns_what_one_process_learns(ranks: LocalGroup, dtype: str, tolerance: float):
    for (losses, norms, rows), (expected_losses, expected_norms, expected_rows) in ranks.run(checks.losses_of_training, dtype, 4):
        assert losses == pytest.approx(expected_losses, rel=tolerance)
        assert norms == pytest.approx(expected_norms, rel=tolerance)
        assert rows == expected_rows


def test_bench_tells_exposed_exchange_and_bandwidth(ranks: LocalGroup, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--expert-parallel", "2", "--thiek", "64,32,16,8,2", "--dtype", "fp32", "--device", "cpu", "--chunks", "2", "--json"]
    answers = ranks.run(checks.bench, [*arguments, "--routing", "nearest", "--tile-m", "8", "--out", str(out)])
    assert [code for code, _ in answers] == [0, 0, 0, 0]
    assert [bool(printed) for _, printed in answers] == [True, False, False, False]
    result = json.loads(answers[0][1])
    assert json.loads(out.read_text()) == result
    judged, forward, both = result["cells"]
    assert judged["passed"] is True
    assert judged["errors"].keys() == {"o", "dx", "dw_up", "dw_down", "drouter"}
    assert (forward["mode"], both["mode"]) == ("forward", "forward+backward")
    for cell in (forward, both):
        assert cell["exposed_ms"] == pytest.approx(cell["ms"] - cell["compute_ms"])
        assert cell["bandwidth_ratio"] == pytest.approx(cell["bus_gb_s"] / cell["backend_bus_gb_s"])
        assert len(cell["peak_mib"]) == 4
        assert cell["rows"]["mean"] <= cell["rows"]["busiest_rank"]
    # Two journeys forward, four in all, of at most every token to the one other rank.
    assert 0 < forward["sent_mib"] <= 2 * 64 * 32 * 4 / 2**20
    assert both["sent_mib"] == pytest.approx(2 * forward["sent_mib"])


def test_example_trains_and_its_checkpoint_loads_on_one_process(ranks: LocalGroup, tmp_path):
    script = Path(__file__).absolute().parents[2] / "examples" / "expert_parallel.py"
    printed, *others = ranks.run(checks.run_script, str(script), "--expert-parallel", "2", "--out", str(tmp_path))
    assert others == ["", "", ""]
    begin, end, loaded = printed.splitlines()
    assert float(end.rsplit(" ", 1)[1]) < 0.5 * float(begin.rsplit(" ", 1)[1])
    assert loaded == "one process loads experts.w_up, experts.w_down, experts.router.weight"


def test_replay_repeats_a_pass_without_travel(ranks: LocalGroup):
    assert all(ranks.run(checks.replay_repeats_a_pass))


def test_checkpoint_of_two_ranks_loads_on_one_and_on_four(ranks: LocalGroup, tmp_path):
    ranks.run(checks.save_on_two, str(tmp_path))
    ranks.run(checks.load_on_four_and_on_one, str(tmp_path))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_experts", 6, "ValueError: num_experts=6: must be a multiple of the 4 processes of the mesh"),
        ("mesh", "two dimensions", "ValueError: mesh has 2 dimensions ('replicas', 'expert'): must have one, such as mesh[\"expert\"]"),
        ("layer", "linear", "TypeError: layer is a Linear: must be a sonicmoe.MoE"),
        ("layer", "twice", "ValueError: layer: its experts are spread over processes already"),
        ("main_grads", True, "ValueError: main_grads=True: must be False for a layer whose experts are spread over processes"),
        ("chunks", 0, "ValueError: chunks=0: must be an int, at least 1"),
        ("transport", "pigeon", "ValueError: transport='pigeon': must be one of all_to_all, symmetric_memory"),
        ("transport", "symmetric_memory", 'ValueError: transport="symmetric_memory": the mesh is on cpu, must be on GPUs'),
    ],
)
def test_refusals(ranks: LocalGroup, option: str, value: object, message: str):
    for said in ranks.run(checks.refusal, option, value):
        assert said.startswith(message)


def test_more_rows_than_capacity_stop_the_device(ranks: LocalGroup):
    for said in ranks.errors(checks.too_many_arrive):
        assert said == "RuntimeError: expert parallelism: more rows arrive than capacity allows"


@pytest.mark.parametrize("processes", [*range(1, 17), 24, 64, 72])
def test_buffers_divide_as_torch_cuts_them(processes: int):
    """Of any number of rows, for the widths of tokens, labels and gradients of scores, with 512 threads or 1,024, within a host or not."""
    for rows in (1, 3, 16384, 16384 * 8):
        for row_bytes in (4, 8, 12, 16, 48, 64, 2880, 8192, 14336):
            made, stride = symmetric.buffer_shape(rows, row_bytes, processes)
            assert made >= rows
            assert stride >= row_bytes
            assert stride % 16 == 0
            for within_host in (True, False):
                for threads in (512, 1024):
                    assert stride % checks.vdev_parts(made * stride, processes, within_host=within_host, threads=threads) == 0


def test_rows_of_64_bytes_in_small_buffers_are_what_torch_refuses():
    """What stopped the device on 2 GPUs: in 2,400 rows of 1,024 bytes it gives each peer 19 blocks."""
    assert checks.vdev_parts(2400 * 1024, 2, within_host=True) == 19
    assert 64 % 19


def test_a_number_of_blocks_that_the_environment_names_divides_too(monkeypatch):
    monkeypatch.setenv("TORCH_SYMMMEM_NBLOCKS", "42")
    assert symmetric.buffer_shape(9, 100, 2)[1] % 21 == 0


def test_a_group_names_the_rank_that_is_gone_and_can_be_renewed():
    with LocalGroup(1) as group:
        with pytest.raises(RankError, match=r"rank 0 is gone \(exit code 3\)"):
            group.run(os._exit, 3)
        with pytest.raises(RankError, match=r"rank 0 is gone \(exit code 3\)"):
            group.run(os.getpid)
        gone = group.processes[0].pid
        assert group.renewed().run(os.getpid) == [group.processes[0].pid]
        assert group.renewed().processes[0].pid != gone


def test_a_stalled_rank_fails_the_others_within_the_timeout(ranks: LocalGroup):
    begin = time.monotonic()
    *waiting, stalled = ranks.errors(checks.last_rank_stalls, 2.0, 1.0)
    assert stalled is None
    assert all("rank 3 was not heard of within 1 s" in line for line in waiting)
    assert time.monotonic() - begin < 15


def test_a_dead_rank_is_named_by_the_others(ranks: LocalGroup):
    """The last test of this file: it leaves the group with three ranks."""
    *alive, dead = ranks.errors(checks.last_rank_dies, 2.0)
    assert dead is None
    for rank, line in enumerate(alive):
        assert f"rank {rank}: a collective of ranks 0 to 3 failed: rank 3 was not heard of within 2 s and may have died" in line
