"""What a kernel cannot take is refused before launch, in one sentence that names the argument."""

import contextlib

import pytest
import torch

from cute_runtime import INT32_ELEMENTS, check_launch, checks, is_supported_device, on_device


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(checks, "is_supported_device", lambda device: True)


def test_cpu_is_no_supported_device():
    assert not is_supported_device(torch.device("cpu"))


def test_tensor_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match=r"^rows: device cpu: must be a GPU of compute capability 9.0 \(sm_90\)$"):
        check_launch(rows=torch.empty(8))


def test_other_gpu_is_named_with_its_capability(monkeypatch):
    monkeypatch.setattr(checks, "is_supported_device", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    described = checks._describe(torch.device("cuda:1"))
    assert described == "cuda:1 (NVIDIA A100, compute capability 8.0)"


def test_tensors_on_two_devices_are_refused(any_device):
    with pytest.raises(ValueError, match=r"^score: device meta: must be rows's device cpu$"):
        check_launch(rows=torch.empty(8), score=torch.empty(8, device="meta"))


def test_non_contiguous_tensor_is_refused(any_device):
    with pytest.raises(ValueError, match=r"^rows: shape \(4, 8\) with strides \(16, 1\): must be contiguous$"):
        check_launch(rows=torch.empty(4, 16)[:, :8])


def test_misaligned_tensor_is_refused(any_device):
    with pytest.raises(ValueError, match=r"^rows: data pointer 0x[0-9a-f]+: must be a multiple of 16 bytes$"):
        check_launch(rows=torch.empty(17)[1:])
    check_launch(alignment=4, rows=torch.empty(17)[1:])


def test_more_elements_than_an_int32_reaches_are_refused(any_device):
    tensor = torch.empty(INT32_ELEMENTS + 1, device="meta")
    with pytest.raises(ValueError, match=r"^rows: 2147483648 elements: must be at most 2147483647$"):
        check_launch(max_elements=INT32_ELEMENTS, rows=tensor)
    check_launch(rows=tensor)


def test_device_is_switched_only_where_another_one_is_current(monkeypatch):
    switched = []
    monkeypatch.setattr(checks, "_current_device", lambda: lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: switched.append(device) or contextlib.nullcontext())
    for name in ("cuda:1", "cuda:0"):
        with on_device(torch.device(name)):
            pass
    assert switched == [torch.device("cuda:0")]


def test_absent_tensors_are_skipped(any_device):
    check_launch(score=None, rows=torch.empty(8))
