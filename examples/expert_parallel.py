"""A block whose experts are spread over processes, under FSDP2 and with a shared expert; saved and loaded as one whole.

    torchrun --nproc-per-node 2 examples/expert_parallel.py --expert-parallel 2 --out /tmp/checkpoint

On GPUs each process takes one and speaks NCCL; without them it runs on CPUs with gloo.
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sonicmoe import MoE
from sonicmoe.parallel import expert_parallel, fully_shard_layer


class Block(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size)
        self.experts = MoE(hidden_size, 2 * hidden_size, num_experts, num_experts_per_tok=2)
        self.shared = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.SiLU(), nn.Linear(2 * hidden_size, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The shared expert runs while tokens travel.
        return x + self.experts(self.norm(x), shared_expert=self.shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert-parallel", type=int, default=2, help="processes that share the experts; divides all processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="out/expert_parallel", help="folder of the checkpoint")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    replicas = dist.get_world_size() // args.expert_parallel
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (replicas, args.expert_parallel), mesh_dim_names=("replicas", "expert"))
    data = mesh["replicas", "expert"]._flatten("data")

    torch.manual_seed(0)
    model = Block(hidden_size=64, num_experts=8).to(mesh.device_type)
    expert_parallel(model.experts, mesh["expert"], chunks=2)
    fully_shard_layer(model.experts, data_mesh=data, replicas_mesh=mesh["replicas"])
    fully_shard(model, mesh=data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)  # parameters are on two meshes

    torch.manual_seed(1 + dist.get_rank())
    x = torch.randn(256, 64, device=mesh.device_type)
    target = x.roll(1, dims=1)
    for step in range(args.steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step in (0, args.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    checkpoint.save(model.state_dict(), checkpoint_id=args.out)
    if dist.get_rank() == 0:
        alone = Block(hidden_size=64, num_experts=8)  # the same names, whole tensors
        state = alone.state_dict()
        checkpoint.load(state, checkpoint_id=args.out, no_dist=True)
        alone.load_state_dict(state)
        print(f"one process loads {', '.join(name for name in state if name.startswith('experts.'))}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
