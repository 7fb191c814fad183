import pytest
import torch

from sonicmoe import backends

CPU = torch.device("cpu")


def test_reference_and_auto_run_everywhere():
    assert backends.resolve("reference", CPU) == "reference"
    assert backends.resolve("auto", CPU) == "reference"
    assert backends.load("reference").__name__ == "sonicmoe.backends.reference"


def test_hopper_is_refused_without_its_kernels(monkeypatch):
    monkeypatch.setattr(backends, "_HOPPER_EXISTS", False)
    with pytest.raises(ValueError, match=r'^backend="hopper": this version has no Hopper kernels yet, must be "auto" or "reference"$'):
        backends.resolve("hopper", CPU)


def test_hopper_is_refused_off_the_gpu_and_auto_is_not(monkeypatch):
    monkeypatch.setattr(backends, "_HOPPER_EXISTS", True)
    with pytest.raises(ValueError, match=r'^backend="hopper": the tensors are on cpu, must be an sm_90 GPU$'):
        backends.resolve("hopper", CPU)
    assert backends.resolve("auto", CPU) == "reference"


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "hopper"), ((8, 0), "reference"), ((10, 0), "reference")])
def test_auto_takes_hopper_on_sm_90_only(monkeypatch, capability, chosen):
    monkeypatch.setattr(backends, "_HOPPER_EXISTS", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.resolve("auto", torch.device("cuda:0")) == chosen


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^backend='cuda': must be one of auto, hopper, reference$"):
        backends.resolve("cuda", CPU)
