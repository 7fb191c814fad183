"""What a layer keeps and needs on its device."""

from collections.abc import Callable, Iterable

import torch


def saved_mib(forward: Callable[[], torch.Tensor], own: Iterable[torch.Tensor]) -> float:
    """MiB that a forward pass keeps for backward beyond the tensors in ``own``, its inputs and parameters."""
    counted = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values()) / 2**20


def peak_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """MiB allocated at the peak of a step, whatever was allocated before included; None where it cannot be measured."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**20
