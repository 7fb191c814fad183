"""ScatterMoE (github.com/shawntan/scattermoe): two of its `parallel_linear` with the activation between them, as its own MLP has it."""

import importlib

import torch


class Layer:
    def __init__(self, problem):
        self.scattermoe = importlib.import_module("scattermoe")
        if problem.slots_per_token is None:
            raise ValueError("routing: must give every token the same number of experts, which ScatterMoE is made for")
        self.problem = problem
        self.leaves = problem.leaves(problem.concatenated)

    def forward(self, *, inference: bool) -> torch.Tensor:
        problem, leaves, K = self.problem, self.leaves, self.problem.slots_per_token
        x = leaves["x"]
        parallel_linear, T = self.scattermoe.parallel_linear, len(x)
        order = self.scattermoe.flatten_sort_count(problem.expert_index.view(T, K), num_experts=problem.num_experts)
        biases = [{"expert_biases": leaves[name]} if name in leaves else {} for name in ("b_up", "b_down")]
        z = parallel_linear(x, leaves["w_up"].mT, K, *order, grouped_out=True, **biases[0])
        gates = leaves["score"].view(T, K).to(x.dtype)
        return parallel_linear(problem.activate(z), leaves["w_down"].mT, 1, *order, grouped_in=True, gates=gates, **biases[1])

    def restore(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.problem.from_layout("concatenated", gradients)
