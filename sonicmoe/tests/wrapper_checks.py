"""What each process of test_wrappers.py runs: a layer in one of PyTorch's wrappers, beside the same layer alone on all data.

Everything is on the default device of its process.
"""

import copy
import json
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sonicmoe import MoE

PROCESSES = 2
"""At most; one GPU has one."""
H, I, E, K = 32, 16, 5, 2
"""Five experts do not divide among two processes."""


def make_layer(dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(0)
    return MoE(H, I, E, K, bias=True, selection_bias=True, dtype=dtype)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(processes, *shape, H)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(PROCESSES, *shape, H, generator=generator, dtype=torch.float64, device="cpu")
    return x[: dist.get_world_size()].to(torch.get_default_device(), dtype)


def loss_and_out(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, router = model(x, return_router=True)
    return out.square().sum() + router.load_balance_loss + router.z_loss, out


def alone(layer: MoE, steps: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By the layer alone: the last step's outputs on this process's tokens, their gradient, and every parameter's.

    Args:
        steps: tokens [step][process]; gradients are means over the processes and sums over the steps.
    """
    layer = copy.deepcopy(layer)
    for step in steps:
        for rank, tokens in enumerate(step):
            x = tokens.clone().requires_grad_()
            loss, out = loss_and_out(layer, x)
            loss.backward()
            if rank == dist.get_rank():
                own = {"out": out.detach(), "x": x.grad}
    return own | {name: parameter.grad / dist.get_world_size() for name, parameter in layer.named_parameters()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients under the plain layer's names."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        found[name.removeprefix("module.").removeprefix("_checkpoint_wrapped_module.")] = grad
    return found


def wrapped(model: nn.Module, steps: list[list[torch.Tensor]], *, accumulate=None) -> dict[str, torch.Tensor]:
    """As `alone`, by a wrapped layer on every process; all steps but the last run under ``accumulate``."""
    for place, step in enumerate(steps):
        x = step[dist.get_rank()].clone().requires_grad_()
        if place + 1 < len(steps):
            with accumulate():
                loss_and_out(model, x)[0].backward()
        else:
            loss, out = loss_and_out(model, x)
            loss.backward()
    return {"out": out.detach(), "x": x.grad} | gradients(model)


def errors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative Frobenius errors; 0 for the same bits, infinite for another dtype or shape, or where only one side is zero."""
    assert got.keys() == expected.keys()
    found = {}
    for name, value in expected.items():
        if got[name].dtype != value.dtype or got[name].shape != value.shape:
            found[name] = float("inf")
            continue
        error, norm = (torch.linalg.norm(tensor.double()).item() for tensor in (got[name] - value, value))
        found[name] = error / norm if norm else float("inf") if error else 0.0
    return found


def ddp() -> dict[str, float]:
    """Two steps add up in .grad, the first without communication."""
    steps = list(draw(2, 9).transpose(0, 1))
    layer = make_layer()
    model = DistributedDataParallel(copy.deepcopy(layer), gradient_as_bucket_view=True)
    return errors(wrapped(model, steps, accumulate=model.no_sync), alone(layer, steps))


def ddp_with_a_process_without_tokens() -> dict[str, float]:
    step = list(draw(9))
    step[-1] = step[-1][:0]
    layer = make_layer()
    return errors(wrapped(DistributedDataParallel(copy.deepcopy(layer)), [step]), alone(layer, [step]))


def ddp_with_checkpointing() -> dict[str, float]:
    steps = list(draw(1, 9).transpose(0, 1))
    layer = make_layer()
    model = DistributedDataParallel(checkpoint_wrapper(copy.deepcopy(layer)))
    return errors(wrapped(model, steps), alone(layer, steps))


def ddp_with_autocast() -> dict[str, float]:
    steps = list(draw(1, 9, dtype=torch.float32).transpose(0, 1))
    layer = make_layer(torch.float32)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        return errors(wrapped(DistributedDataParallel(copy.deepcopy(layer)), steps), alone(layer, steps))


def fsdp() -> dict[str, float]:
    """Two steps of SGD: gradients of the second, and the parameters behind it."""
    steps = list(draw(2, 9).transpose(0, 1))
    layer = make_layer()
    model = fully_shard(copy.deepcopy(layer))
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (layer, model)]
    for step in steps:
        expected, got = alone(layer, [step]), wrapped(model, [step])
        for name, parameter in layer.named_parameters():
            parameter.grad = expected[name]
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    before = make_layer()
    for name, parameter in model.named_parameters():
        moved = parameter.full_tensor().detach() - before.get_parameter(name)
        got[f"step of {name}"], expected[f"step of {name}"] = moved, (layer.get_parameter(name) - before.get_parameter(name)).detach()
    return errors(got, expected)


def fsdp_with_a_process_without_tokens() -> dict[str, float]:
    step = list(draw(3, 3))
    step[0] = step[0][:0]
    layer = make_layer()
    return errors(wrapped(fully_shard(copy.deepcopy(layer)), [step]), alone(layer, [step]))


def fsdp_in_mixed_precision() -> dict[str, float]:
    """Parameters are gathered in bfloat16 and gradients reduced in float32, as by a bfloat16 layer whose gradients are widened."""
    step = list(draw(9, dtype=torch.float32))
    layer = make_layer(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    got = wrapped(fully_shard(copy.deepcopy(layer), mp_policy=policy), [step])
    narrow, rank = copy.deepcopy(layer).bfloat16(), dist.get_rank()
    parts = []
    for tokens in step:
        narrow.zero_grad()
        x = tokens.bfloat16().requires_grad_()
        loss, out = loss_and_out(narrow, x)
        loss.backward()
        own = {"out": out.detach(), "x": x.grad.float()}
        parts.append(own | {name: parameter.grad.float() for name, parameter in narrow.named_parameters()})
    means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0] if name not in ("out", "x")}
    return errors(got, {"out": parts[rank]["out"], "x": parts[rank]["x"]} | means)


def fsdp_with_checkpointing_and_autocast() -> dict[str, float]:
    step = list(draw(3, 3, dtype=torch.float32))
    layer = make_layer(torch.float32)
    model = fully_shard(checkpoint_wrapper(copy.deepcopy(layer)), reshard_after_forward=True)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        return errors(wrapped(model, [step]), alone(layer, [step]))


def fsdp_from_meta() -> dict[str, float]:
    """Sharded before it has memory: what is loaded into the shards is what a plain layer has."""
    layer = make_layer()
    with torch.device("meta"):
        model = MoE(H, I, E, K, bias=True, selection_bias=True, dtype=torch.float64)
    fully_shard(model)
    model.to_empty(device=torch.get_default_device())
    for name, tensor in model.state_dict().items():
        whole = layer.state_dict()[name]
        if hasattr(tensor, "device_mesh"):
            whole = torch.distributed.tensor.distribute_tensor(whole, tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)
    step = list(draw(9))
    return errors(wrapped(model, [step]), alone(layer, [step]))


CHECKS = {
    function.__name__: function
    for function in (
        ddp,
        ddp_with_a_process_without_tokens,
        ddp_with_checkpointing,
        ddp_with_autocast,
        fsdp,
        fsdp_with_a_process_without_tokens,
        fsdp_in_mixed_precision,
        fsdp_with_checkpointing_and_autocast,
        fsdp_from_meta,
    )
}


def run(rank: int, folder: str, processes: int, device_type: str) -> None:
    """Run all checks as one of the processes, on the CPU or on a GPU of its own, and write {check: {tensor: error}} to a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*returned a view tensor")
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    torch.set_default_device(device)
    store = dist.FileStore(f"{folder}/store", processes)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timedelta(minutes=5))
    found = {name: check() for name, check in CHECKS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
