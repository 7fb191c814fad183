"""Shared by every package's tests, under pytest and under Bazel: GPU tests are skipped, with the reason, where they cannot run."""

import pytest


def missing_gpu() -> str | None:
    """Why GPU tests cannot run here, or None where an sm_90 GPU is present."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device (torch.cuda.is_available() is false)"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"{torch.cuda.get_device_name()} is sm_{capability[0]}{capability[1]}, the kernels need sm_90"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    reason = missing_gpu()
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs an sm_90 GPU: {reason}"))
