"""The timing of transformers' layers at tiny size: what it records, what it leaves out, and that no wrong result is timed."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from testing import transformers_layers as layers  # noqa: E402

TINY = ("--tiny", "--device", "cpu", "--json")


def run(capsys, *arguments):
    status = layers.main([*TINY, *arguments])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", layers.MODELS)
def test_every_implementation_is_compared_and_timed(model, capsys, tmp_path):
    out = tmp_path / "result.json"
    status, result = run(capsys, "--dtype", "fp32", "--models", model, "--steps", "decode 1,training", "--out", str(out))
    assert status == 0
    assert json.loads(out.read_text()) == result
    assert {"device", "driver", "power_limit_w", "versions", "commit", "dirty", "date", "command", "cells"} <= result.keys()
    assert result["versions"]["transformers"] == transformers.__version__
    names = {
        f"{model}/{step}/{each}/{scope}" for step in ("decode 1", "training") for each in layers.IMPLEMENTATIONS for scope in layers.SCOPES
    }
    assert {cell["name"] for cell in result["cells"]} == names
    for cell in result["cells"]:
        assert cell["passed"]
        assert cell["ms"] > 0
        assert cell["repeats"] >= 2
        assert cell["thiek"] == [1 if cell["step"] == "decode 1" else 32, 64, 32, 8, 2]
        assert cell["mode"] == ("inference" if cell["step"] == "decode 1" else "forward+backward")
        assert cell["difference_from_eager"] < 1e-5
    assert layers.select(result) == []
    assert len(layers.table({**result, "tiny": False}).splitlines()) == 6


def test_full_sizes_are_the_published_ones():
    """Parameters of one layer's experts: 8 x 3 x 4096 x 14336, and so on."""
    for name, experts in {"Mixtral-8x7B": 1_409_286_144, "Qwen3-30B-A3B": 603_979_776, "gpt-oss-20b": 796_262_400}.items():
        with torch.device("meta"):
            layer = layers.build(name, dtype="bf16", device=torch.device("meta"))
        weights = [parameter for parameter in layer.experts.parameters() if parameter.dim() == 3]
        assert sum(weight.numel() for weight in weights) == experts
        assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_a_wrong_result_is_not_timed_and_fails_the_command(capsys, monkeypatch):
    ours = ALL_EXPERTS_FUNCTIONS[layers.OURS]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, layers.OURS, lambda *inputs: 1.01 * ours(*inputs))
    status, result = run(capsys, "--dtype", "fp32", "--models", "Qwen3-30B-A3B", "--steps", "decode 8")
    assert status == 1
    found = {cell["scope"]: cell for cell in result["cells"] if cell["implementation"] == layers.OURS}
    assert "ms" not in found["experts"]
    assert found["experts"]["why"] == "output differs by 1.0e-02 from eager's, must be at most 1e-04"
    assert all(cell["passed"] for cell in result["cells"] if cell["implementation"] != layers.OURS)


def test_a_wrong_gradient_is_not_timed(capsys, monkeypatch):
    ours = ALL_EXPERTS_FUNCTIONS[layers.OURS]

    def wrong(experts, x, index, weights):
        return ours(experts, x, index, weights) + 0.01 * (x - x.detach())

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, layers.OURS, wrong)
    status, result = run(capsys, "--dtype", "fp32", "--models", "Mixtral-8x7B", "--steps", "training")
    assert status == 1
    whys = {cell["name"].split("/", 2)[2]: cell["why"] for cell in result["cells"] if not cell["passed"]}
    assert whys.keys() == {"sonicmoe_experts/layer", "sonicmoe_experts/experts"}
    assert all(why.startswith("a gradient differs by") for why in whys.values())


def test_what_is_refused_or_too_large_says_why(capsys, monkeypatch):
    def refuse(*inputs):
        raise ValueError("not on this machine")

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", refuse)
    monkeypatch.setattr(layers.benchmark, "available_memory", lambda device: 2**10)
    status, result = run(capsys, "--dtype", "fp32", "--models", "Mixtral-8x7B", "--steps", "decode 8")
    whys = {cell["implementation"]: cell["why"] for cell in result["cells"] if not cell["passed"]}
    assert status == 0
    assert whys == {"batched_mm": "needs 0 GiB for 16 copies of experts", "grouped_mm": "ValueError: not on this machine"}


def test_unknown_names_are_refused_in_one_line(capsys):
    assert layers.main(["--tiny", "--models", "GPT-5"]) == 2
    assert capsys.readouterr().err == "error: --models GPT-5: must be of Mixtral-8x7B, Qwen3-30B-A3B, gpt-oss-20b\n"
