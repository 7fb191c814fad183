"""Train a small language model, plain PyTorch around `sonicmoe.MoE`, sharded over processes by FSDP2 (`fully_shard`).

One process for each GPU, bfloat16 products with float32 parameters, gradients and optimizer:

    torchrun --nproc-per-node 8 examples/train_fsdp2.py --hidden 1024 --intermediate 512 --experts 64 --layers 8

The same on CPUs, in float32 (this is what the tests run):

    torchrun --nproc-per-node 2 examples/train_fsdp2.py --device cpu

Each process trains on windows of its own from the text of `sonicmoe train`. At the end, rank 0 writes a checkpoint of whole tensors.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sonicmoe import MoE
from sonicmoe.training import text


class Block(nn.Module):
    """x += attention(norm(x)); x += MoE(norm(x)). Returns x and the router's load balance loss."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.heads = args.heads
        self.attention_norm = nn.RMSNorm(args.hidden, eps=1e-6)
        self.qkv = nn.Linear(args.hidden, 3 * args.hidden, bias=False)
        self.output = nn.Linear(args.hidden, args.hidden, bias=False)
        self.experts_norm = nn.RMSNorm(args.hidden, eps=1e-6)
        self.experts = MoE(args.hidden, args.intermediate, args.experts, args.experts_per_token)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        update, router = self.experts(self.experts_norm(x), return_router=True)
        return x + update, router.load_balance_loss


class Model(nn.Module):
    """Bytes (B, S) -> next-byte logits (B, S, 256) and the sum of the layers' load balance losses."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.bytes = nn.Embedding(text.VOCABULARY, args.hidden)
        self.positions = nn.Embedding(args.context, args.hidden)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden, eps=1e-6)
        self.head = nn.Linear(args.hidden, text.VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        losses = []
        for block in self.blocks:
            x, loss = block(x)
            losses.append(loss)
        return self.head(self.norm(x)), torch.stack(losses).sum()


def make_sharded_model(args: argparse.Namespace, device: torch.device) -> Model:
    """A whole block's parameters are gathered for its forward and its backward, and no more than that.

    Also the root's are given back after its forward, unlike by default, so that ``model.parameters()`` are the shards at all times.

    Every process draws the same parameters and keeps its part. A model too large for that is built under
    ``torch.device("meta")``, sharded, given memory by ``to_empty`` and loaded from a checkpoint.
    """
    torch.manual_seed(args.seed)
    with device:
        model = Model(args)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy, reshard_after_forward=True)


@torch.no_grad()
def validation_loss(model: Model, data: text.Text, args: argparse.Namespace, device: torch.device) -> float:
    """Nats a byte, without the load balance loss; the same windows on every process."""
    inputs, targets = text.validation_windows(data.validation, context=args.context, max_windows=32)
    logits, _ = model(inputs.to(device))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten()).item()


def train(model: Model, data: text.Text, args: argparse.Namespace, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    for step in range(args.steps):
        own_seed = args.seed * dist.get_world_size() + dist.get_rank()
        batch = text.training_batch(data.train, batch_size=args.batch_size, context=args.context, seed=own_seed, step=step)
        inputs, targets = (tensor.to(device) for tensor in batch)
        logits, balance = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) + 0.01 * balance
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="PATH", help="text file, or a folder of them (default: pydoc_data.topics)")
    parser.add_argument("--out", metavar="FILE", default="out/fsdp2.pt", help="the trained parameters (default: out/fsdp2.pt)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default: 3e-3")
    sizes = {"steps": 200, "batch-size": 16, "context": 128, "layers": 2, "hidden": 64, "heads": 4}
    sizes |= {"intermediate": 64, "experts": 16, "experts-per-token": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    data = text.load(args.data, args.context)
    model = make_sharded_model(args, device)
    before = validation_loss(model, data, args, device)
    train(model, data, args, device)
    after = validation_loss(model, data, args, device)
    own = sum(parameter.to_local().numel() for parameter in model.parameters())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        total = sum(tensor.numel() for tensor in state.values())
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, args.out)
        print(f"{dist.get_world_size()} processes, {own} of {total} parameters on rank 0")
        print(f"validation loss {before:.3f} before, {after:.3f} after {args.steps} steps: nats a byte")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
