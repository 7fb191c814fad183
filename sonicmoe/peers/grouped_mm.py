"""torch's grouped_mm with the plain sort, gather and weighted sum that a user would write around it.

Rows are sorted by expert and gathered into a copy of x; gate and up are concatenated in w_up, so that each is a contiguous half of z;
the weighted sum over a token's experts is a small batched product.
"""

import torch
import torch.nn.functional as F


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows (R, in) of expert e, up to ``ends[e]``, times ``weights[e]`` (E, in, out) -> (R, out)."""
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public from torch 2.10 on
    return function(rows, weights, offs=ends)


class Layer:
    def __init__(self, problem):
        self.problem = problem
        self.leaves = problem.leaves(problem.concatenated)

    def forward(self, *, inference: bool) -> torch.Tensor:
        problem, leaves = self.problem, self.leaves
        x, experts = leaves["x"], problem.num_experts
        sorted_expert, order = problem.expert_index.sort(stable=True)
        ends = torch.searchsorted(sorted_expert, torch.arange(experts, device=x.device), right=True).int()
        token = problem.token_index[order]
        z = grouped_mm(x[token], leaves["w_up"].mT, ends)
        if "b_up" in leaves:
            z = z + leaves["b_up"][sorted_expert]
        y = grouped_mm(problem.activate(z), leaves["w_down"].mT, ends)
        if "b_down" in leaves:
            y = y + leaves["b_down"][sorted_expert]
        score = leaves["score"].to(x.dtype)
        if problem.slots_per_token is None:
            return torch.zeros_like(x).index_add(0, token, y * score[order].unsqueeze(1))
        slots = len(x), problem.slots_per_token
        by_token = y[order.argsort()].view(*slots, -1)
        return (score.view(*slots).unsqueeze(1) @ by_token).squeeze(1)

    def restore(self, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.problem.from_layout("concatenated", gradients)
