"""MegaBlocks (github.com/databricks/megablocks): the experts of its dropless layer, with grouped products.

It keeps gate and up in matrices of their own and the down-projection as (E*I, H), that is transposed.
"""

import importlib

import torch


class Layer:
    def __init__(self, problem):
        if problem.b_up is not None:
            raise ValueError("bias: MegaBlocks has none in its experts")
        if problem.slots_per_token is None:
            raise ValueError("routing: must give every token the same number of experts, as MegaBlocks' dropless layer does")
        arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
            hidden_size=problem.x.shape[1],
            ffn_hidden_size=problem.w_down.shape[2],
            bias=False,
            return_bias=False,
            activation_fn=problem.act,
            moe_num_experts=problem.num_experts,
            moe_top_k=problem.slots_per_token,
            moe_loss_weight=0.0,
            mlp_type="glu" if problem.gated else "mlp",
            mlp_impl="grouped",
            fp16=problem.x.dtype == torch.float16,
            bf16=problem.x.dtype == torch.bfloat16,
            device=problem.x.device,
        )
        self.experts = importlib.import_module("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)
        self.problem = problem
        own = {"w2": problem.w_down.mT.reshape(-1, problem.x.shape[1])}
        first = problem.split(problem.w_up) if problem.gated else (problem.w_up,)
        own |= {name: weight.reshape(-1, weight.shape[2]) for name, weight in zip(("w1", "v1"), first, strict=False)}
        for name, weight in own.items():
            setattr(self.experts.mlp, name, torch.nn.Parameter(weight.contiguous()))
        given = problem.leaves()
        self.leaves = {"x": given["x"], "score": given["score"], **{name: getattr(self.experts.mlp, name) for name in own}}

    def forward(self, *, inference: bool) -> torch.Tensor:
        x, problem = self.leaves["x"], self.problem
        slots = len(x), problem.slots_per_token
        weights = self.leaves["score"].view(*slots).to(x.dtype)
        # The scores of all experts are for a balance loss, whose weight is 0 here.
        return self.experts(x, None, weights, problem.expert_index.view(*slots))

    def restore(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        problem, (experts, hidden, width) = self.problem, self.problem.w_down.shape
        by_expert = {name: gradients[name].view(experts, width, hidden) for name in gradients if name not in ("x", "score")}
        w_up = problem.join(by_expert["w1"], by_expert["v1"]) if problem.gated else by_expert["w1"]
        return {"x": gradients["x"], "score": gradients["score"], "w_up": w_up, "w_down": by_expert["w2"].mT}
