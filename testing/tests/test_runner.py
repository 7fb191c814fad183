"""Running: crashes and time limits cost one cell, killed runs resume, shards add up to the whole."""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from testing.matrix import gate, pool, runner
from testing.matrix.cells import MatrixError, load_matrix
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


def test_a_process_that_its_cell_has_broken_runs_no_other():
    jobs = [pool.Job(name, 1, 1, cost, timeout_s=60) for name, cost in (("first", 3.0), ("second", 2.0), ("third", 1.0))]
    ended = [
        event
        for event in pool.run_jobs(jobs, crashing.setup_losing, environments=[{}], memory_bytes=10)
        if isinstance(event, pool.Finished)
    ]
    pids = {event.name: event.result["pid"] for event in ended}
    assert pids["first"] != pids["second"] == pids["third"]
    assert all(pool.LOST not in event.result for event in ended)


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


@contextmanager
def full_disk(most_bytes):
    """No file may grow beyond this; Python raises OSError as for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most_bytes", [10, 600])
def test_a_full_disk_is_one_sentence_and_what_was_done_can_be_resumed(run, most_bytes):
    with full_disk(most_bytes), pytest.raises(MatrixError, match=r"shard-1-of-1\.partial\.jsonl: cannot be written: File too large$"):
        run()
    assert [path.name for path in (run.tmp_path / "out").iterdir()] == ([] if most_bytes < 100 else ["shard-1-of-1.partial.jsonl"])
    assert set(statuses(run(resume=True)).values()) == {"passed", "not run"}


def test_a_shard_that_does_not_exist_is_refused(run):
    with pytest.raises(MatrixError, match="--shard 3/2: the shards are counted from 1 to 2"):
        run(shard_index=3, shard_count=2)


def test_a_cell_has_the_same_seed_on_any_shard(run):
    whole = {cell["name"]: cell.get("seed") for cell in run()["cells"]}
    parts = [run(shard_index=index, shard_count=2) for index in (1, 2)]
    assert {cell["name"]: cell.get("seed") for part in parts for cell in part["cells"]} == whole
    assert len({seed for seed in whole.values() if seed is not None}) == 4


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """Runs a matrix with three speed cells under the hopper profile on GPUs that are only named; returns who ran where and when."""
    matrix = load_matrix(small_matrix.write(tmp_path, ("modes: [forward]", "modes: [inference, forward, forward+backward]")))
    monkeypatch.setenv("MATRIX_TEST_LOG", str(tmp_path / "log"))

    def start(**changes):
        runner.run_shard(matrix, matrix.profiles["hopper"], options(tmp_path / "out", **changes), crashing.setup_noting, MACHINE)
        lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
        return {name: (gpu, float(begin), float(end)) for name, gpu, begin, end, _ in lines}

    return start


def test_speed_cells_have_a_gpu_for_themselves_after_everything_else(noted, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ran = noted(gpus=2, jobs=4)
    speed = {name: run for name, run in ran.items() if name.startswith("speed/")}
    checks = [run for name, run in ran.items() if name not in speed]
    assert len(speed) == 3
    assert {gpu for gpu, _, _ in checks} <= {"0", "1"} == {gpu for gpu, _, _ in speed.values()}
    assert max(end for _, _, end in checks) < min(begin for _, begin, _ in speed.values())
    for gpu in "01":
        alone = sorted(run[1:] for run in speed.values() if run[0] == gpu)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(alone))


def test_workers_share_out_the_gpus_that_the_run_may_see(noted, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert {gpu for gpu, _, _ in noted(gpus=2, jobs=2).values()} == {"GPU-aa", "GPU-bb"}


def test_memory_is_counted_for_each_gpu():
    jobs = [pool.Job(name, 1, 6, 1.0, timeout_s=60) for name in ("a", "b", "c", "d")]
    environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "1", "0", "1")]
    running = most = 0
    for event in pool.run_jobs(jobs, crashing.setup, environments=environments, memory_bytes=10):
        running += 1 if isinstance(event, pool.Started) else -1
        most = max(most, running)
    assert most == 2


KILLED_RUN = """
import sys
from pathlib import Path
from testing.matrix import runner
from testing.matrix.cells import load_matrix
from testing.tests import crashing
out = Path(sys.argv[1])
matrix = load_matrix(out / "matrix.yaml")
options = runner.RunOptions(1, 1, out / "out", 1, 7, None, False, 0, "test")
if __name__ == "__main__":
    runner.run_shard(matrix, matrix.profiles["cpu"], options, crashing.setup, {"device": "test"})
"""


def test_a_run_killed_outright_leaves_no_worker_and_resumes(run):
    """SIGKILL in the middle of the third cell: the two before it are kept, and its worker does not live on."""
    order = ["layer/one", "layer/two", "route/rounded", "count/e4"]
    run.tell("route/rounded", "hang")
    script = run.tmp_path / "killed.py"
    script.write_text(KILLED_RUN)
    journal, hung = run.tmp_path / "out" / "shard-1-of-1.partial.jsonl", run.tmp_path / "told" / "route-rounded.pid"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(script), str(run.tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: journal.exists() and "layer/two" in journal.read_text() and hung.exists() and hung.read_text())
        worker = int(hung.read_text())
        assert alive(worker)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not alive(worker))
    done = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:]]
    assert set(done) < set(order)
    (run.tmp_path / "log").unlink()
    (run.tmp_path / "told" / "route-rounded").unlink()
    assert statuses(run(resume=True))["route/rounded"] == "passed"
    assert run.log() == sorted(set(order) - set(done))


def wait_until(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_share_cores_and_gpus_and_sleep_while_they_wait(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert runner.worker_environment(0, 3, 0, cores=8) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    assert runner.worker_environment(0, 8, 0, cores=2)["OMP_NUM_THREADS"] == "1"
    assert [runner.worker_environment(index, 4, 2, cores=8)["CUDA_VISIBLE_DEVICES"] for index in range(4)] == ["4", "5", "4", "5"]
