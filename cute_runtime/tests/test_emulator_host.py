"""The emulator's host side: tensors that claim a device, and the time in which the CPU is one."""

import numpy as np
import pytest
import torch

import cute_runtime
from cute_runtime import Variant, checks, emulator
from cute_runtime.emulator import host
from cute_runtime.emulator.tensors import as_device_tensor, region_of


def test_device_tensor_shares_the_memory_of_the_host_tensor():
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    claimed = as_device_tensor(tensor)
    assert claimed.device.type == "cuda"
    assert tuple(claimed.shape) == (2, 3)
    assert claimed.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        (torch.zeros(3, 4, dtype=torch.bfloat16), 24),
        (torch.zeros(8, 4)[::2, :2], (6 * 4 + 2) * 4),
        (torch.zeros(0, 4), 0),
        (torch.nn.Parameter(torch.zeros(5)), 20),
        (np.zeros((2, 2), np.int64), 32),
    ],
)
def test_region_reaches_from_the_first_element_to_the_last(tensor, size):
    assert region_of(tensor, "x").size == size


def test_region_is_named_for_messages():
    assert region_of(torch.zeros(3, 4, dtype=torch.bfloat16), "argument 2").name == "argument 2 (bfloat16, shape (3, 4))"


def test_cpu_is_the_device_only_within_emulation(monkeypatch):
    calls = []
    monkeypatch.setattr(host, "launch", lambda variant, *arguments, **options: calls.append((variant.name, arguments, options)) or ["ran"])
    monkeypatch.setattr(cute_runtime, "load", lambda variant: lambda *arguments: calls.append(("real", *arguments)))
    variant, tensor = Variant("toy.kernels.gemm"), torch.zeros(4)
    with emulator.emulation(seed=5, multiprocessors=3, resident=2) as statistics:
        assert cute_runtime.is_supported_device(tensor.device)
        checks.check_launch(tensor=tensor)
        assert torch.cuda.get_device_properties(tensor.device).multi_processor_count == 3
        with torch.cuda.device(tensor.device):
            kept = cute_runtime.load(variant)
            kept(tensor, 1)
        assert statistics == ["ran"]
    assert not cute_runtime.is_supported_device(tensor.device)
    with pytest.raises(ValueError, match="tensor: device cpu: must be a GPU"):
        checks.check_launch(tensor=tensor)
    kept(tensor, 2)  # a host half that keeps its kernel meets the real one again
    assert calls == [("toy.gemm", (tensor, 1), {"seed": 5, "history": [], "resident": 2}), ("real", tensor, 2)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"grid": (3,), "cluster": (2,)}, r"grid \(3, 1, 1\): must be whole clusters of \(2, 1, 1\)"),
        ({"grid": (1, 65536)}, r"grid \(1, 65536, 1\): must be at most \(2147483647, 65535, 65535\)"),
        ({"grid": (0,)}, r"grid \(0, 1, 1\) of blocks \(32, 1, 1\): must be at least one of at most 1024 threads"),
        ({"block": (32, 33)}, r"of blocks \(32, 33, 1\)"),
        ({"dynamic_bytes": 232449}, "232449 bytes of shared memory: at most 232448 a block"),
    ],
)
def test_what_a_device_would_not_launch_is_refused(shape, message):
    text = ".version 8.8\n.target sm_90a\n.visible .entry k()\n{\nret;\n}\n"
    with pytest.raises(emulator.EmulationError, match=message):
        emulator.run_ptx(text, **shape)
