"""`sonicmoe input`: what it counts as waiting, its results, and on a GPU that prefetched steps wait least."""

import itertools
import json

import pytest
import torch

from routing import RouterConfig
from sonicmoe import cli, input_wait
from sonicmoe.benchmark import Problem
from sonicmoe.data import PrefetchLoader
from sonicmoe.thiek import Thiek

SMALL = ["--thiek", "64,32,16,8,2", "--device", "cpu", "--rounds", "2", "--gib", str(4 * 64 * 32 * 2 / 2**30)]


def problem(T=64, H=32):
    return Problem(Thiek(T, H, 16, 8, 2), RouterConfig(k=2), torch.device("cpu"), backend="reference")


def test_waiting_is_what_lies_between_one_steps_end_and_the_nexts_begin(monkeypatch):
    """Batches take 3 s to come and steps 10 s, on a clock of our own; the first group of two does not count."""
    now = itertools.count()
    clock = {"time": 0.0}
    monkeypatch.setattr(input_wait.time, "perf_counter", lambda: clock["time"])

    def arriving():
        for _ in range(4):
            clock["time"] += 3
            yield next(now)

    def step(batch):
        clock["time"] += 10

    group = input_wait._run(arriving(), step, 2, torch.device("cpu"))
    assert group == input_wait.Group(26_000, [3000, 3000])
    assert group.step_ms == 13_000
    assert group.share == pytest.approx(3 / 13)


def test_input_of_a_group_is_a_whole_number_of_batches():
    large = problem(T=32768, H=4096)
    assert input_wait.batch_bytes(large) == 2**28
    assert input_wait.batches_of(large, 2) == 8
    with pytest.raises(ValueError, match=r"gib=0.1: must be at least one batch of T=32768, 0.25 GiB"):
        input_wait.batches_of(large, 0.1)


@pytest.mark.parametrize("kind", input_wait.KINDS)
def test_every_kind_brings_the_batches_in_order_with_their_values(kind, monkeypatch):
    made = []
    monkeypatch.setattr(input_wait, "PrefetchLoader", lambda *given: made.append(given) or PrefetchLoader(*given))
    batches = [torch.full((2,), float(index)) for index in range(5)]
    seen = list(input_wait._arriving(kind, batches, torch.device("cpu")))
    assert [batch.tolist() for batch in seen] == [[index, index] for index in range(5)]
    assert len(made) == (kind == "prefetched")


def test_result_has_a_cell_for_each_kind_of_input(capsys, tmp_path):
    out = tmp_path / "input.json"
    assert cli.main(["input", *SMALL, "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    assert {"device", "driver", "power_limit_w", "versions", "commit", "dirty", "date", "command", "cells"} == result.keys()
    cells = {cell["input"]: cell for cell in result["cells"]}
    assert tuple(cells) == input_wait.KINDS
    resident = cells["resident"]["ms"]
    for cell in cells.values():
        assert (cell["thiek"], cell["mode"], cell["batch_mib"]) == ([64, 32, 16, 8, 2], "forward+backward", 64 * 32 * 2 / 2**20)
        assert cell["repeats"] == 2 * 4
        assert cell["tflops"] == pytest.approx(18 * 128 * 32 * 16 / (cell["ms"] * 1e9))
        assert cell["slower_than_resident"] == pytest.approx(cell["ms"] / resident - 1)
        assert 0 <= cell["input_wait_ms"] < cell["ms"]
        assert "ratio" not in cell  # the README's table is of those


def test_waiting_too_long_fails_and_says_how_long(capsys, monkeypatch):
    measured = {kind: [input_wait.Group(100, [1.0] * 4)] for kind in input_wait.KINDS}
    monkeypatch.setattr(input_wait, "measure", lambda *_, **__: measured)
    assert cli.main(["input", *SMALL, "--max-wait", "0.04"]) == 0
    assert "4.00%" in capsys.readouterr().out
    assert cli.main(["input", *SMALL, "--max-wait", "0.01"]) == 1
    assert capsys.readouterr().err.strip() == "prefetched steps wait for 4.00% of their time, at most 1.00% is asked for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "rounds=0: must be at least 1"),
        (["--gib", "1e-9"], "gib=1e-09: must be at least one batch of T=64"),
        (["--gib", "1e6"], "gib=1000000.0: needs about"),
        (["--max-wait", "2"], "max_wait=2.0: must be from 0 to 1"),
        (["--out", "no/such/folder.json"], "out='no/such/folder.json': must be in a folder that exists"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert cli.main(["input", *SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.gpu
def test_gpu_prefetched_steps_wait_less_than_pinned_and_pageable_ones(capsys):
    argv = ["--thiek", "16384,4096,512,32,4", "--gib", "1", "--rounds", "3", "--seed", "0"]
    assert cli.main(["input", *argv, "--json"]) == 0
    wait = {cell["input"]: cell["input_wait_share"] for cell in json.loads(capsys.readouterr().out)["cells"]}
    assert wait["resident"] < 0.02
    assert wait["prefetched"] < min(wait["pinned"], wait["pageable"])
    assert wait["pinned"] < wait["pageable"]
