"""Run an expert-parallel layer on a problem that a single device could have, and put the results of all processes together.

What `sonicmoe.cases.run` returns for one process this returns for a mesh of them, for the same oracle to judge.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from routing import Routing
from sonicmoe.cases import Case
from sonicmoe.moe import MoE
from sonicmoe.parallel.apply import expert_parallel

_GRADIENTS = {"w_up": "dw_up", "w_down": "dw_down", "b_up": "db_up", "b_down": "db_down"}


def own_tokens(split: Sequence[int], rank: int) -> slice:
    """Which of all tokens are the rank's, when ``split`` says how many each has, in the order of the ranks."""
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def run(case: Case, mesh: DeviceMesh, split: Sequence[int], *, backend: str = "auto", **options) -> tuple[dict[str, torch.Tensor], Routing]:
    """One forward and backward pass; every process draws the whole case and works on its tokens and experts.

    Args:
        case: the same on every process of the mesh.
        split: tokens of each process.
        options: of `expert_parallel`.

    Returns:
        o, dx, dw_up, dw_down, drouter (and biases) of all tokens and experts, and the routing of all tokens, on every process.
    """
    layer = expert_parallel(case.layer(backend), mesh, src_data_rank=None, **options)
    return run_layer(layer, case, mesh, split)


def run_layer(layer: MoE, case: Case, mesh: DeviceMesh, split: Sequence[int]) -> tuple[dict[str, torch.Tensor], Routing]:
    """`run` for a layer that has been through `expert_parallel`."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    own, own_experts = own_tokens(split, rank), own_tokens([case.thiek.E // mesh.size()] * mesh.size(), rank)
    x = case.x[own].detach().clone().requires_grad_()
    out, router = layer(x, return_router=True)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(out, [x, *parameters.values()], case.dout[own])
    result = {"o": _whole(out.detach(), case.x.shape, own, group), "dx": _whole(gradients[0], case.x.shape, own, group)}
    for name, gradient in zip(parameters, gradients[1:], strict=True):
        if name == "router.weight":  # each process has the gradient of its own tokens
            total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            dist.all_reduce(total, group=group)
            result["drouter"] = total.to(gradient.dtype)
        else:
            # Not full_tensor: its collective reads a GPU's memory from the host with gloo (torch 2.11).
            result[_GRADIENTS[name]] = _whole(gradient.to_local(), gradient.shape, own_experts, group)
    return result, _whole_routing(router.routing, case, own, group)


def _whole(part: torch.Tensor, shape: torch.Size, own: slice, group: dist.ProcessGroup) -> torch.Tensor:
    """All processes' rows; adding zeros changes no value."""
    whole = part.new_zeros(shape)
    whole[own] = part
    dist.all_reduce(whole, group=group)
    return whole


def _whole_routing(routing: Routing, case: Case, own: slice, group: dist.ProcessGroup) -> Routing:
    """Who goes where, over all tokens, ascending by token and expert; scores are left to the oracle."""
    T, _, _, E, _ = case.thiek
    chosen = torch.zeros(T + 1, E + 1, dtype=torch.int32, device=case.x.device)
    live = routing.expert_index < E
    token = torch.where(live, routing.token_index + own.start, T).long()
    chosen[token, torch.where(live, routing.expert_index, E).long()] = 1
    chosen = chosen[:T, :E].contiguous()
    dist.all_reduce(chosen, group=group)
    token_index, expert_index = chosen.nonzero(as_tuple=True)
    score = torch.zeros(len(token_index), device=chosen.device)
    return Routing(token_index.int(), expert_index.int(), score, T, E, None)
