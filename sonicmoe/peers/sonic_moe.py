"""sonic-moe (github.com/Dao-AILab/sonic-moe), as of its commit 8565e84.

Its layer chooses the experts itself, so what is called is what that layer calls behind its router: the metadata of a top-K routing,
the up-projection and the down-projection with the weighted sum. Gate and up are interleaved, and experts are the last dimension of
a view of the weights.
"""

import importlib

import torch

ACTIVATIONS = {
    "swiglu": "swiglu",
    "geglu": "geglu",
    "reglu": "reglu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu_squared": "relu_sq",
}


class Layer:
    def __init__(self, problem):
        # By name: "sonicmoe" is here the peer's package, not the one that this file belongs to.
        self.functional = importlib.import_module("sonicmoe.functional")
        self._let_backward_export()
        self.count_cumsum = importlib.import_module("sonicmoe.count_cumsum").count_cumsum
        if problem.activation not in ACTIVATIONS:
            raise ValueError(f"activation={problem.activation!r}: sonic-moe has {', '.join(ACTIVATIONS)}")
        if problem.slots_per_token is None:
            raise ValueError("routing: must give every token the same number of experts here")
        self.activation = importlib.import_module("sonicmoe.enums").ActivationType(ACTIVATIONS[problem.activation])
        self.problem = problem
        self.leaves = problem.leaves(problem.interleaved)

    @staticmethod
    def _let_backward_export() -> None:
        """Detach what the peer's backward hands to its compiler.

        It exports views of weights and of z there. In newer torch (seen in 2.13) a view made inside a custom operator needs a gradient
        where its base does, which export refuses.
        """
        backward = importlib.import_module("sonicmoe.functional.backward")
        export = backward.convert_torch_tensor_to_cute_tensor
        backward.convert_torch_tensor_to_cute_tensor = lambda tensor, *layout: export(tensor.detach(), *layout)

    def forward(self, *, inference: bool) -> torch.Tensor:
        problem, leaves, functional = self.problem, self.leaves, self.functional
        x, K, E = leaves["x"], problem.slots_per_token, problem.num_experts
        T = len(x)
        expert_index = problem.expert_index.view(T, K)
        _, ends = self.count_cumsum(expert_index.view(-1), E, do_cumsum=True)
        offsets, *metadata = functional.TC_topk_router_metadata(expert_index, ends, K)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        w_up, w_down = leaves["w_up"].permute(1, 2, 0), leaves["w_down"].permute(1, 2, 0)
        up = (x, w_up, leaves.get("b_up"), offsets, T * K, K, stream, *metadata, False, self.activation, inference)
        a, z = functional._UpProjection.apply(*up)
        score = leaves["score"].view(T, K)
        down = (a, z, w_down, leaves.get("b_down"), score, offsets, T, K, stream, *metadata, False, self.activation)
        return functional._DownProjection.apply(*down)

    def restore(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.problem.from_layout("interleaved", gradients)
