import inspect

import pytest
import torch

import cute_runtime
from sonicmoe import MoE, backends

CPU = torch.device("cpu")


def pretend_capability(monkeypatch, capability):
    """Every GPU has it; what is known of the real ones stays untouched."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cute_runtime, "is_supported_device", cute_runtime.is_supported_device.__wrapped__)


def test_reference_and_auto_run_everywhere():
    assert backends.resolve("reference", CPU, torch.bfloat16) == "reference"
    assert backends.resolve("auto", CPU, torch.bfloat16) == "reference"
    assert backends.load("reference").__name__ == "sonicmoe.backends.reference"


def test_hopper_is_refused_off_the_gpu():
    with pytest.raises(ValueError, match=r'^backend="hopper": the tensors are on cpu, must be an sm_90 GPU$'):
        backends.resolve("hopper", CPU, torch.bfloat16)


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "hopper"), ((8, 0), "reference"), ((10, 0), "reference")])
def test_auto_takes_hopper_on_sm_90_only(monkeypatch, capability, chosen):
    pretend_capability(monkeypatch, capability)
    assert backends.resolve("auto", torch.device("cuda:0"), torch.float16) == chosen


def test_hopper_is_refused_on_another_gpu(monkeypatch):
    pretend_capability(monkeypatch, (10, 0))
    with pytest.raises(ValueError, match=r'^backend="hopper": the tensors are on cuda:1, must be an sm_90 GPU$'):
        backends.resolve("hopper", torch.device("cuda:1"), torch.bfloat16)


def test_float32_runs_on_the_reference_and_is_refused_by_hopper(monkeypatch):
    pretend_capability(monkeypatch, (9, 0))
    assert backends.resolve("auto", torch.device("cuda:0"), torch.float32) == "reference"
    with pytest.raises(ValueError, match=r'^backend="hopper": the tensors are torch.float32, must be bfloat16 or float16$'):
        backends.resolve("hopper", torch.device("cuda:0"), torch.float32)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "capability", "initialized", "begins"),
    [
        ("auto", "cuda:0", torch.bfloat16, (9, 0), True, True),
        ("hopper", "cuda:0", torch.float16, (9, 0), True, True),
        ("reference", "cuda:0", torch.bfloat16, (9, 0), True, False),
        ("auto", "cuda:0", torch.float32, (9, 0), True, False),
        ("auto", "cuda:0", torch.bfloat16, (8, 0), True, False),
        ("auto", "cuda:0", torch.bfloat16, (9, 0), False, False),  # fake tensors of a GPU
        ("auto", "cpu", torch.bfloat16, (9, 0), True, False),
        ("auto", "meta", torch.bfloat16, (9, 0), True, False),
    ],
)
def test_prepares_where_kernels_will_run(monkeypatch, backend, device, dtype, capability, initialized, begins):
    calls = []
    pretend_capability(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(cute_runtime, "prepare", lambda: calls.append("begun"))
    backends.prepare(backend, torch.device(device), dtype)
    assert calls == ["begun"] * begins


def test_a_layer_prepares_for_the_device_of_its_weights(monkeypatch):
    calls = []
    monkeypatch.setattr(backends, "prepare", lambda *arguments: calls.append(arguments))
    with torch.device("meta"):
        MoE(16, 8, 4, 2, dtype=torch.bfloat16)
    MoE(16, 8, 4, 2, backend="hopper")
    assert calls == [("auto", torch.device("meta"), torch.bfloat16), ("hopper", CPU, torch.float32)]


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"^backend='cuda': must be one of auto, hopper, reference$"):
        backends.resolve("cuda", CPU, torch.bfloat16)


def test_hopper_serves_the_operations_of_the_reference():
    hopper, reference = backends.load("hopper"), backends.load("reference")
    operations = [name for name, value in vars(reference).items() if inspect.isfunction(value) and value.__module__ == reference.__name__]
    public = [name for name in operations if not name.startswith("_")]
    assert len(public) == 6
    for name in public:
        assert inspect.signature(getattr(hopper, name)) == inspect.signature(getattr(reference, name))
