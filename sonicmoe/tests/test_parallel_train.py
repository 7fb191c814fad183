"""``sonicmoe train --expert-parallel`` under torchrun, with a process that dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sonicmoe import cli
from sonicmoe.training import text
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.experiment import Experiment, read_checkpoint

CONFIG = TrainConfig(
    steps=32,
    batch_size=4,
    context=16,
    hidden_size=32,
    intermediate_size=16,
    layers=1,
    heads=2,
    num_experts=4,
    experts_per_token=2,
    routing="nearest",
    tile_m=8,
    lr=3e-3,
)
OPTIONS = [item for name in vars(CONFIG) for item in (f"--{name.replace('_', '-')}", str(getattr(CONFIG, name)))]
TIMEOUT_S = 180
BENCH = ["bench", "--thiek", "8,16,8,4,2"]


def torchrun(out: Path, log: Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    train = ["-m", "sonicmoe", "train", "--expert-parallel", "2", "--timeout", "30", "--device", "cpu", "--out", str(out), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The launcher looks at its processes seldom, so that the one that is left finds out by itself before it is asked to stop.
    launcher += ["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "5"]
    return subprocess.Popen([*launcher, *train], stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def wait_until(condition, what: str):
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def workers(launcher: subprocess.Popen) -> list[int]:
    """The launcher's child processes that run the command."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"sonicmoe" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run of two processes, one of which was killed after the first checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    out, log = folder / "out", folder / "log"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes(b"of an earlier run")
    launcher = torchrun(out, log)
    try:
        wait_until((out / "checkpoint.previous.pt").exists, "no start")
        wait_until((out / "checkpoint.pt").exists, "no checkpoint")
        os.kill(workers(launcher)[-1], signal.SIGKILL)
        assert launcher.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        launcher.kill()
    return out, log.read_text()


def test_resumes_from_its_last_checkpoint_after_a_restart(interrupted: tuple[Path, str]):
    out, said = interrupted
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["resumed"] is True
    assert metrics["processes"] == 2
    assert len(metrics["results"]["nearest"]["history"]["loss"]) == CONFIG.steps
    assert "was not heard of within 5 s and may have died" in said
    assert f"the last good checkpoint is {out / 'checkpoint.pt'}" in said
    assert (out / "checkpoint.previous.pt").read_bytes() == b"of an earlier run"


def test_learns_what_one_process_learns(interrupted: tuple[Path, str]):
    """The same losses from the same batches; sums in another order may, later, tip a token to another expert for a step."""
    out, _ = interrupted
    alone = Experiment(CONFIG, text.load(None, CONFIG.context), device=torch.device("cpu"))
    while not alone.finished:
        alone.advance()
    got, expected = read_checkpoint(out / "checkpoint.pt")["learners"]["nearest"]["history"], vars(alone.learners["nearest"].history)
    for series in ("loss", "load_balance_loss", "z_loss", "gradient_norm"):
        difference = (torch.tensor(got[series]) / torch.tensor(expected[series]) - 1).abs()
        assert difference[:8].max() <= 1e-4, series
        assert difference.median() <= 1e-3, series
    for series in ("rows", "dropped_rows", "added_rows"):
        assert got[series][:8] == expected[series][:8]
    assert got["validation"][-1][1] == pytest.approx(expected["validation"][-1][1], rel=1e-2)
    assert got["validation"][-1][1] < 0.9 * got["validation"][0][1]


def test_one_process_continues_the_checkpoint_of_two(interrupted: tuple[Path, str]):
    out, _ = interrupted
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    alone = Experiment(CONFIG, text.load(None, CONFIG.context), device=torch.device("cpu"))
    alone.restore(out / "checkpoint.pt", checkpoint)
    assert alone.finished
    moments = alone.learners["nearest"].optimizer.state_dict()["state"]
    for index, moment in checkpoint["learners"]["nearest"]["optimizer"]["state"].items():
        torch.testing.assert_close(moments[index]["exp_avg"], moment["exp_avg"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--chunks", "2"], "sonicmoe train: --chunks 2: needs --expert-parallel"),
        ([*BENCH, "--transport", "symmetric_memory"], "--transport symmetric_memory: needs --expert-parallel"),
        ([*BENCH, "--out", "x.json"], "--out x.json: needs --expert-parallel"),
        ([*BENCH, "--expert-parallel", "2", "--capacity", "2"], "--capacity 2.0: is for --transport symmetric_memory"),
        ([*BENCH, "--expert-parallel", "2", "--trials", "3"], "--trials 3: is for one process"),
    ],
)
def test_option_that_would_do_nothing_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_needs_torchrun(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--expert-parallel", "2"]) == 2
    assert capsys.readouterr().err == (
        "sonicmoe train: --expert-parallel 2: must be started by torchrun, such as "
        "torchrun --nproc-per-node 2 -m sonicmoe train --expert-parallel 2\n"
    )
