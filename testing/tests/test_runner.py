"""Running: crashes and time limits cost one cell, killed runs resume, shards add up to the whole."""

import json

import pytest

from testing.matrix import gate, pool, runner
from testing.matrix.cells import MatrixError
from testing.tests import crashing, small_matrix

MACHINE = {"device": "test", "driver": None, "versions": {}, "commit": "0" * 40, "dirty": False, "date": "2026-01-01"}


def options(out, **changes):
    values = {"shard_index": 1, "shard_count": 1, "out": out, "jobs": 2, "seed": 7, "pattern": None, "resume": False, "gpus": 0}
    return runner.RunOptions(**{**values, "command": "test", **changes})


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the small matrix with test work; `told` says what a cell does, `log` lists what ran."""
    matrix = small_matrix.load(tmp_path)
    (tmp_path / "told").mkdir()
    monkeypatch.setenv("MATRIX_TEST_DIR", str(tmp_path / "told"))
    monkeypatch.setenv("MATRIX_TEST_LOG", str(tmp_path / "log"))

    def start(**changes):
        return runner.run_shard(matrix, matrix.profiles["cpu"], options(tmp_path / "out", **changes), crashing.setup, MACHINE)

    start.matrix, start.tmp_path = matrix, tmp_path
    start.tell = lambda name, order: (tmp_path / "told" / name.replace("/", "-")).write_text(order)
    start.log = lambda: sorted(line.split()[0] for line in (tmp_path / "log").read_text().splitlines())
    return start


def statuses(result):
    return {cell["name"]: cell["status"] for cell in result["cells"]}


def test_a_crashing_cell_fails_alone_and_says_why(run):
    run.tell("layer/one", "die")
    run.tell("layer/two", "exit")
    result = run()
    assert statuses(result) == {
        "layer/one": "failed", "layer/two": "failed", "route/rounded": "passed", "count/e4": "passed", "speed/fast/forward": "not run",
    }  # fmt: skip
    whys = {cell["name"]: cell["why"] for cell in result["cells"]}
    assert whys["layer/one"] == "the worker died: signal SIGABRT"
    assert whys["layer/two"] == "the worker died: exit status 7"
    assert whys["speed/fast/forward"] == "needs an sm_90 GPU"
    assert json.loads((run.tmp_path / "out" / "shard-1-of-1.json").read_text()) == result


def test_a_cell_past_its_time_limit_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("MATRIX_TEST_DIR", str(tmp_path))
    (tmp_path / "slow").write_text("hang")
    jobs = [pool.Job("slow", 1, 1, 1.0, timeout_s=1.0), pool.Job("quick", 1, 1, 0.5, timeout_s=60)]
    ended = [event for event in pool.run_jobs(jobs, crashing.setup, environments=[{}], memory_bytes=10) if isinstance(event, pool.Finished)]
    assert [(event.name, event.crash) for event in ended] == [("slow", "ran past its limit of 1 s and was stopped"), ("quick", "")]


def test_jobs_that_do_not_fit_in_memory_together_run_one_after_the_other():
    jobs = [pool.Job(name, 1, 6, 1.0, timeout_s=60) for name in ("a", "b", "c")]
    running = most = 0
    for event in pool.run_jobs(jobs, crashing.setup, environments=[{}, {}], memory_bytes=10):
        running += 1 if isinstance(event, pool.Started) else -1
        most = max(most, running)
    assert most == 1


def test_shards_add_up_to_the_whole_and_pass_the_gate(run):
    for index in (1, 2):
        run(shard_index=index, shard_count=2)
    assert run.log() == ["count/e4", "layer/one", "layer/two", "route/rounded"]
    out = run.tmp_path / "out"
    verdict = gate.decide(run.matrix, [out / "shard-1-of-2.json", out / "shard-2-of-2.json"], "cpu")
    assert verdict.passed
    assert (verdict.count("passed"), verdict.count("not run")) == (4, 1)


def test_a_killed_run_resumes_from_the_cells_already_done_with_the_same_seed(run):
    whole = run(seed=11)
    out = run.tmp_path / "out"
    (out / "shard-1-of-1.json").unlink()
    header = {key: whole[key] for key in ("schema", "profile", "shard", "cells_asked", "sources", "seed")}
    done = next(cell for cell in whole["cells"] if cell["name"] == "layer/one")
    half_a_line = json.dumps(whole["cells"][1])[:50]
    (out / "shard-1-of-1.partial.jsonl").write_text("\n".join([json.dumps(header), json.dumps(done), half_a_line]))
    (run.tmp_path / "log").unlink()
    resumed = run(seed=99, resume=True)
    assert run.log() == ["count/e4", "layer/two", "route/rounded"]
    assert resumed["seed"] == 11
    assert [cell["name"] for cell in resumed["cells"]] == [cell["name"] for cell in whole["cells"]]
    assert not (out / "shard-1-of-1.partial.jsonl").exists()


def test_resuming_a_finished_run_runs_nothing(run):
    first = run()
    (run.tmp_path / "log").write_text("")
    assert statuses(run(resume=True)) == statuses(first)
    assert run.log() == []


def test_resuming_with_other_sources_is_refused(run):
    run()
    path = run.tmp_path / "out" / "shard-1-of-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sources": "other"}))
    with pytest.raises(MatrixError, match="was made with sources other"):
        run(resume=True)


def test_an_unwritable_folder_is_refused_before_anything_runs(run):
    (run.tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(MatrixError, match="cannot be written"):
        run()
    assert not (run.tmp_path / "log").exists()


def test_a_shard_that_does_not_exist_is_refused(run):
    with pytest.raises(MatrixError, match="--shard 3/2: the shards are counted from 1 to 2"):
        run(shard_index=3, shard_count=2)


def test_a_cell_has_the_same_seed_on_any_shard(run):
    whole = {cell["name"]: cell.get("seed") for cell in run()["cells"]}
    parts = [run(shard_index=index, shard_count=2) for index in (1, 2)]
    assert {cell["name"]: cell.get("seed") for part in parts for cell in part["cells"]} == whole
    assert len({seed for seed in whole.values() if seed is not None}) == 4
