"""``sonicmoe train`` as a user meets it: what it writes, what it prints, how it stops and what it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sonicmoe
from sonicmoe import cli
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.experiment import read_checkpoint
from sonicmoe.training.recorded import load_recorded_logits

SIZES = {
    "steps": 16, "batch-size": 2, "context": 16, "hidden-size": 16, "intermediate-size": 8, "layers": 1, "heads": 2, "num-experts": 4,
    "experts-per-token": 2, "tile-m": 8,
}  # fmt: skip
TINY = ["--device", "cpu", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]
FILES = ["checkpoint.pt", "curves.png", "metrics.json", "routing.npz"]


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run next to each other: threads that wait for each other on a busy core take longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_run_writes_everything_and_prints_json_only(tmp_path, capsys):
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "new" / "folder"), "--json"]) == 0
    out = tmp_path / "new" / "folder"
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((out / "metrics.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert sorted(printed["files"]) == FILES
    assert printed["finished"] is True
    for routing in ("top_k", "nearest"):
        assert printed["results"][routing].items() <= written["results"][routing].items()
        assert len(written["results"][routing]["history"]["loss"]) == 16
        assert printed["results"][routing]["validation_loss"] < printed["results"][routing]["validation_loss_start"]
    png = (out / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(png[16:20]) == int.from_bytes(png[20:24]) == 1500
    assert load_recorded_logits(out / "routing.npz", 32, 12, 0).shape == (32, 12)
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 16


def test_table_compares_the_routings_with_the_baselines(tmp_path, capsys):
    assert cli.main(["train", *TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for value in (*(result["validation_loss"] for result in metrics["results"].values()), metrics["baselines"]["unigram"]):
        assert f"{value:.3f}" in printed.out
    for label in ("top-K", "token rounding (nearest)", "tokens/s", "dropped", "added", "wasted rows, tiles of 8", "load imbalance"):
        assert label in printed.out
    assert "step 16/16 nearest: loss" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "{tmp}/none.txt"], "none.txt: no such file or folder"),
        (["--data", "{tmp}/empty.txt"], "empty.txt: the file is empty"),
        (["--data", "{tmp}/short.txt"], "short.txt: 40 bytes of text leave"),
        (["--hidden-size", "100"], "hidden_size=100: must be a multiple of 8"),
        (["--experts-per-token", "9"], "experts_per_token=9: must be between 1 and num_experts=4"),
        (["--device", "abacus"], "device='abacus': must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device='cuda:99': this machine has"),
        (["--resume", "{tmp}/none"], "none: cannot be read"),
        (["--resume", "{tmp}/short.txt"], "short.txt: not a checkpoint of sonicmoe train"),
        (["--out", "{tmp}/short.txt/out"], "short.txt/out: cannot write there"),
    ],
)
def test_user_error_is_one_sentence_and_leaves_nothing(tmp_path, capsys, options, message):
    (tmp_path / "short.txt").write_text("To be, or not to be." * 2)
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    options = [option.format(tmp=tmp_path) for option in options]
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_missing_matplotlib_is_said_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'sonicmoe[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_diverged_run_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    rate = TrainConfig.learning_rate
    monkeypatch.setattr(TrainConfig, "learning_rate", lambda self, step: rate(self, step) if step < 9 else math.inf)
    assert cli.main(["train", *TINY, "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the loss is no longer finite (routing top_k, after step 10: validation loss nan)" in message
    assert message.endswith(f"the last good checkpoint is {tmp_path / 'checkpoint.pt'}")
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_interrupted_run_saves_and_resumes_with_its_own_options(tmp_path, capsys):
    options = [*TINY, "--steps", "4000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sonicmoe", "train", *options, "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(sonicmoe.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr.readline().startswith("step ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT after step" in err
    assert "Traceback" not in err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    assert 0 < checkpoint["step"] < 4000
    assert checkpoint["config"]["hidden_size"] == 16

    assert cli.main(["train", "--resume", str(tmp_path), "--lr", "0.5"]) == 2
    assert "--lr 0.5: the checkpoint was made with 0.002" in capsys.readouterr().err


def test_resumed_command_finishes_what_was_left(tmp_path, capsys, monkeypatch):
    rate = TrainConfig.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "learning_rate", lambda self, step: rate(self, step) if step < 9 else math.inf)
        assert cli.main(["train", *TINY, "--out", str(tmp_path / "broken")]) == 1
    assert cli.main(["train", *TINY, "--out", str(tmp_path / "whole")]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "broken"), "--device", "cpu"]) == 0
    resumed, whole = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("broken", "whole"))
    assert resumed["resumed"] is True
    assert resumed["config"] == whole["config"]
    for routing in ("top_k", "nearest"):
        assert resumed["results"][routing]["validation_loss"] == whole["results"][routing]["validation_loss"]
        assert resumed["results"][routing]["history"]["loss"] == whole["results"][routing]["history"]["loss"]
