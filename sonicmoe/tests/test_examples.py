"""The scripts of examples/, run at small size on the CPU as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).absolute().parents[2]


def run_example(name, *arguments, cwd, launcher=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_swapped_mixtral_is_the_same_model(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = run_example("swap_mixtral.py", "--tokens", "32", cwd=tmp_path)
    assert float(re.search(r"relative difference of the logits: (\S+)", out)[1]) < 1e-5
    assert len(re.search(r"next tokens: \[(.*)\]", out)[1].split(",")) == 8


def test_qwen3_moe_learns_and_is_saved_as_any_model(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed, and the Trainer needs it")
    out = run_example("finetune_qwen3_moe.py", "--steps", "20", "--context", "32", "--batch-size", "8", "--out", "model", cwd=tmp_path)
    before, after = map(float, re.search(r"validation loss (\S+) before, (\S+) after", out).groups())
    # Uniform guesses over 256 bytes cost 5.5 nats; the bytes' frequencies alone bring about 3.2.
    assert 5 < before < 6
    assert after < before - 1
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_two_processes_train_shards_and_save_whole_parameters(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    sizes = ("--steps", "20", "--context", "32", "--batch-size", "8", "--experts", "5", "--experts-per-token", "2", "--layers", "1")
    out = run_example("train_fsdp2.py", "--device", "cpu", *sizes, "--out", "model.pt", cwd=tmp_path, launcher=torchrun)
    processes, own, total = map(int, re.search(r"(\d+) processes, (\d+) of (\d+) parameters on rank 0", out).groups())
    before, after = map(float, re.search(r"validation loss (\S+) before, (\S+) after", out).groups())
    assert before > 5
    assert after < before - 1
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["blocks.0.experts.w_up"].shape == (5, 128, 64)
    assert total == sum(tensor.numel() for tensor in state.values())
    # Rank 0 holds three experts of five, and half of all the rest.
    experts = sum(tensor.numel() for name, tensor in state.items() if ".experts." in name)
    assert processes == 2
    assert own == experts * 3 // 5 + (total - experts) // 2
