"""What of a training step is each process's: all of it where there is one, else a share of the sequences and of the experts.

Expert-parallel training is data-parallel in everything but the experts: every process has all other weights and a share of each
batch. Losses are means over the processes, so that a run's numbers are, but for the order of sums, those of one process.
A checkpoint always holds whole tensors: any number of processes reads it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from sonicmoe.moe import EXPERT_PARAMETERS
from sonicmoe.parallel.launch import Processes
from sonicmoe.training.model import LanguageModel


class Alone:
    """One process has everything."""

    first = True
    """Whether this process speaks for all."""
    processes_used = 1

    def spread(self, model: LanguageModel) -> None:
        """Called once, before training."""

    def owns_part_of(self, name: str) -> bool:
        """Whether a parameter, by its name in the model, is only partly here."""
        return False

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """What is here of a parameter or its gradient."""
        return tensor

    def sequences(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's sequences of a batch (B, S)."""
        return batch

    def reduce_gradients(self, weights: Sequence[torch.Tensor], partial: Sequence[bool]) -> torch.Tensor:
        """Make every gradient that of the mean loss over all processes; returns the norm of all of them."""
        return torch.nn.utils.get_total_norm([weight.grad for weight in weights])

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return values

    def total_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Of a RouterOutput's counts: over all processes that they do not cover yet."""
        return counts

    def gathered(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """All processes' tensors on the CPU, one after the other."""
        return tensor.cpu()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """All experts' values of a partial tensor."""
        return part

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's experts' values."""
        return whole

    def write(self, action: Callable[[], object]) -> None:
        """Run ``action`` once for all processes; it is done when this returns."""
        action()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag


class Shares(Alone):
    """A share for each process that torchrun has started. Every method but the first three is a collective."""

    def __init__(self, processes: Processes, *, batch_size: int, **options) -> None:
        """``options`` are those of `expert_parallel`. Raises ValueError for a batch that cannot be shared."""
        if batch_size % processes.size:
            raise ValueError(f"batch_size={batch_size}: must be a multiple of the {processes.size} processes")
        self.processes, self.options = processes, options
        self.first, self.processes_used = processes.rank == 0, processes.size

    def owns_part_of(self, name: str) -> bool:
        return name.rsplit(".", 1)[-1] in EXPERT_PARAMETERS

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    def sequences(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.tensor_split(self.processes.size)[self.processes.rank]

    def spread(self, model: LanguageModel) -> None:
        from sonicmoe.parallel import expert_parallel  # a second of imports that one process does without

        for block in model.blocks:
            expert_parallel(block.experts, self.processes.expert, **self.options)

    def reduce_gradients(self, weights: Sequence[torch.Tensor], partial: Sequence[bool]) -> torch.Tensor:
        squares = []
        for is_partial in (False, True):
            gradients = [weight.grad for weight, part in zip(weights, partial, strict=True) if part == is_partial]
            # An expert's gradient is the sum over the processes that share experts already, where there are more it needs the others'.
            over = self.processes.mesh["replicas"] if is_partial else None
            flat = nn.utils.parameters_to_vector(gradients).div_(self.processes.size)
            self.processes.all_reduce(flat, over)
            nn.utils.vector_to_parameters(flat, gradients)
            squares.append(flat.square().sum())
        self.processes.all_reduce(squares[1], self.processes.expert)
        return (squares[0] + squares[1]).sqrt()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.processes.all_reduce(values) / self.processes.size

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return self.processes.all_reduce(values)

    def total_counts(self, counts: torch.Tensor) -> torch.Tensor:
        return self.processes.all_reduce(counts, self.processes.mesh["replicas"])

    def gathered(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self.processes.gather(tensor.cpu()), dim)

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """By adding zeros, which changes no bit and needs no equal parts."""
        expert = self.processes.expert
        whole = part.new_zeros(part.shape[0] * expert.size(), *part.shape[1:])
        self.part(whole).copy_(part)
        return self.processes.all_reduce(whole, expert)

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        expert = self.processes.expert
        return whole.chunk(expert.size())[expert.get_local_rank()]

    def write(self, action: Callable[[], object]) -> None:
        self.processes.first_does(action)

    def any(self, flag: bool) -> bool:
        return self.processes.largest(float(flag)) > 0
