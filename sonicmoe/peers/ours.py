"""This library's `routed_experts`, measured as every peer is."""

import torch


class Layer:
    def __init__(self, problem):
        from routing import Routing

        self.problem, self.leaves = problem, problem.leaves()
        tokens, experts = len(problem.x), problem.num_experts
        self.routing = Routing(problem.token_index, problem.expert_index, self.leaves["score"], tokens, experts, problem.slots_per_token)

    def forward(self, *, inference: bool) -> torch.Tensor:
        from sonicmoe import routed_experts

        problem = self.problem
        weights = {name: tensor for name, tensor in self.leaves.items() if name != "score"}
        options = {"activation": problem.activation, "gate_up_layout": problem.gate_up_layout, "backend": problem.backend}
        return routed_experts(**weights, routing=self.routing, **options)

    def restore(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return gradients
