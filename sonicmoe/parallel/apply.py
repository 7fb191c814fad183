"""`expert_parallel`: spread a layer's experts over the processes of a DeviceMesh, as a function and as a ParallelStyle."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from sonicmoe.moe import EXPERT_PARAMETERS, MoE
from sonicmoe.parallel.layer import ExpertParallelism
from sonicmoe.parallel.transport import AllToAll, Transport

TRANSPORTS = ("all_to_all", "symmetric_memory")


def expert_parallel(
    layer: MoE,
    mesh: DeviceMesh,
    *,
    transport: str | Transport = "all_to_all",
    chunks: int = 1,
    max_tokens: int | None = None,
    capacity: float | None = None,
    src_data_rank: int | None = 0,
) -> MoE:
    """Give each process of a mesh E/W neighbouring experts of the layer, which from then on sends tokens to their experts.

    w_up, w_down and their biases become DTensors, sharded on dimension 0; names in state_dict stay as they are. The router stays
    whole on every process. Each process passes its own tokens, T of them or none, and gets their outputs; a pass is a collective
    of the mesh, forward and backward. A loss that each process takes of its own tokens gives the experts the sum of all processes'
    gradients and the router those of its own tokens: who averages losses over the processes divides the experts' gradients by
    their number, and averages the router's as those of every other replicated parameter (`fully_shard_layer` does both).

    Args:
        layer: the same on every process, on any device; experts on a meta device stay there.
        mesh: one-dimensional, for instance ``mesh["expert"]``.
        transport: "all_to_all" is all_to_all_single with split sizes and one small host read; "symmetric_memory" leaves the sizes on
            the device; or a `Transport` of the mesh's group.
        chunks: tokens travel in as many parts, one part's journey under another's products.
        max_tokens: the most tokens a process will pass; symmetric memory is sized by it, and all processes must name the same.
        capacity: of symmetric memory, see `sonicmoe.parallel.symmetric.SymmetricMemory`; None is the worst case.
        src_data_rank: the rank within the mesh whose values count; None trusts that all processes hold the same.

    Returns:
        The same layer.

    Raises:
        ValueError, TypeError: what cannot be, in one sentence, before anything is changed.
    """
    _check(layer, mesh, chunks)
    own = _transport(transport, mesh, chunks, max_tokens, capacity)
    for name in EXPERT_PARAMETERS:
        parameter = getattr(layer, name)
        if parameter is not None:
            shards = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=src_data_rank)
            layer.register_parameter(name, nn.Parameter(shards, requires_grad=parameter.requires_grad))
    if src_data_rank is not None:
        for tensor in layer.router.state_dict(keep_vars=True).values():
            if not tensor.is_meta:
                dist.broadcast(tensor.detach(), group=mesh.get_group(), group_src=src_data_rank)
    layer.parallelism = ExpertParallelism(own, chunks)
    return layer


class ExpertParallel(ParallelStyle):
    """`expert_parallel` for `torch.distributed.tensor.parallel.parallelize_module`; the arguments are those of the function."""

    def __init__(
        self, *, transport: str = "all_to_all", chunks: int = 1, max_tokens: int | None = None, capacity: float | None = None
    ) -> None:
        super().__init__()
        self.options = {"transport": transport, "chunks": chunks, "max_tokens": max_tokens, "capacity": capacity}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return expert_parallel(module, device_mesh, src_data_rank=self.src_data_rank, **self.options)


def fully_shard_layer(layer: MoE, *, data_mesh: DeviceMesh, replicas_mesh: DeviceMesh, **options) -> FSDPModule:
    """FSDP2 for an expert-parallel layer, for a loss that is averaged over all processes.

    The router's gradients are averaged over ``data_mesh``, all processes that have their own tokens. The experts', which are sums over
    the expert-parallel processes already, are reduced over ``replicas_mesh``, the processes that own the same experts, and divided by
    the size of ``data_mesh``.

    Args:
        layer: as `expert_parallel` leaves it.
        data_mesh: for instance ``mesh["replicas", "expert"]._flatten("data")``.
        replicas_mesh: for instance ``mesh["replicas"]``, of the same mesh as ``expert_parallel``'s.
        options: of `torch.distributed.fsdp.fully_shard`, such as ``reshard_after_forward``.
    """
    if layer.parallelism is None:
        raise ValueError("layer: must have been through expert_parallel first")
    fully_shard(layer.router, mesh=data_mesh, **options)
    fully_shard(layer, mesh=replicas_mesh, **options)
    layer.set_gradient_divide_factor(data_mesh.size())
    layer.set_force_sum_reduction_for_comms(True)  # gloo cannot divide on the way
    return layer


def _check(layer: MoE, mesh: DeviceMesh, chunks: int) -> None:
    if not isinstance(layer, MoE):
        raise TypeError(f"layer is a {type(layer).__name__}: must be a sonicmoe.MoE")
    if layer.parallelism is not None:
        raise ValueError("layer: its experts are spread over processes already")
    if layer.main_grads:
        raise ValueError("main_grads=True: must be False for a layer whose experts are spread over processes")
    if mesh.ndim != 1:
        raise ValueError(f'mesh has {mesh.ndim} dimensions {mesh.mesh_dim_names}: must have one, such as mesh["expert"]')
    if layer.num_experts % mesh.size():
        raise ValueError(f"num_experts={layer.num_experts}: must be a multiple of the {mesh.size()} processes of the mesh")
    if not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks={chunks!r}: must be an int, at least 1")


def _transport(transport: str | Transport, mesh: DeviceMesh, chunks: int, max_tokens: int | None, capacity: float | None) -> Transport:
    if not isinstance(transport, str):
        return transport
    if transport not in TRANSPORTS:
        raise ValueError(f"transport={transport!r}: must be one of {', '.join(TRANSPORTS)}")
    if transport == "all_to_all":
        return AllToAll(mesh.get_group())
    from sonicmoe.parallel import symmetric

    if max_tokens is None or max_tokens < 1:
        raise ValueError(f'max_tokens={max_tokens}: must be at least 1 for transport="symmetric_memory"')
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)
    return symmetric.shared(mesh.get_group(), device, -(-max_tokens // chunks), capacity)
