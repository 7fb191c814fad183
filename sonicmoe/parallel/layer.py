"""A layer's work where its experts are spread over the processes of a group.

Notation: W processes, T tokens of this process, H hidden size, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from routing import RouterConfig, Routing, expert_counts, load_balance_loss, router_z_loss
from routing.recomputed import Origin
from sonicmoe.experts import routed_experts
from sonicmoe.moe import RouterOutput
from sonicmoe.parallel import exchange
from sonicmoe.parallel.failures import naming_failures
from sonicmoe.parallel.plan import plan_sends
from sonicmoe.parallel.rounding import GlobalTargets
from sonicmoe.parallel.transport import Transport


@dataclass(frozen=True)
class ExpertParallelism:
    """The `sonicmoe.moe.Parallelism` of a layer; made by `sonicmoe.parallel.expert_parallel`."""

    transport: Transport
    chunks: int

    @property
    def group(self) -> dist.ProcessGroup:
        return self.transport.group

    @property
    def processes(self) -> int:
        return dist.get_world_size(self.group)

    def local(self, parameter: torch.Tensor | None) -> torch.Tensor | None:
        """This process's experts of a parameter; a plain tensor is taken to be them already."""
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def route(
        self, config: RouterConfig, logits: torch.Tensor, selection_bias: torch.Tensor | None, origin: Origin | None = None
    ) -> Routing:
        """This process's tokens, with token rounding over those of all processes."""
        if config.method == "top_k" or self.processes == 1:
            return config.route(logits, selection_bias=selection_bias, origin=origin)
        targets = GlobalTargets(self.group, config.tile_m, config.mode)
        return config.route(logits, selection_bias=selection_bias, targets=targets, origin=origin)

    def routed_experts(
        self,
        x: torch.Tensor,
        w_up: torch.Tensor,
        w_down: torch.Tensor,
        routing: Routing,
        *,
        meanwhile: Callable[[], torch.Tensor] | None = None,
        **options,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`sonicmoe.routed_experts` for x (T, H) and this process's experts (E/W, ...), and what ``meanwhile`` returned.

        A collective of the group: every process must call it as often, forward and backward, with any T. ``options`` are those of
        `sonicmoe.routed_experts`.
        """
        if self.processes == 1:
            return routed_experts(x, w_up, w_down, routing, **options), None if meanwhile is None else meanwhile()
        experts, num_tokens = w_up.shape[0], x.shape[0]
        if routing.num_experts != experts * self.processes:
            raise ValueError(f"routing.num_experts={routing.num_experts}: must be {experts} experts here times {self.processes} processes")
        trip = self._prepare(routing, num_tokens, experts)
        # All chunks leave at once: they travel one after the other, each but the first while the experts work on those before.
        labels, copies = exchange.depart(x, routing.score, trip)
        added = None if meanwhile is None else meanwhile()
        returning = []
        for chunk, arrived in enumerate(exchange.unpack(labels, trip)):
            rows = exchange.arrive(copies[chunk], trip, chunk)
            y = routed_experts(rows, w_up, w_down, arrived, **options)
            del rows
            returning.append(exchange.give_back(y, trip, chunk))
        return exchange.land(returning, trip), added

    def _prepare(self, routing: Routing, num_tokens: int, experts: int) -> exchange.Trip:
        """Plans and sizes. What does not need the sizes on the host is launched before they are waited for."""
        sends = plan_sends(routing, processes=self.processes, chunks=self.chunks)
        sizes = {"num_tokens": num_tokens, "slots_per_token": routing.slots_per_token, "experts": experts}
        announced = self.transport.announce(sends.counts(self.chunks), **sizes)
        labels = sends.labels(routing.score)
        arriving = exchange.arrivals(announced)
        return exchange.pack(sends, labels, announced.legs(), arriving, self.chunks, self.transport, experts)

    def router_output(self, config: RouterConfig, logits: torch.Tensor, routing: Routing) -> RouterOutput:
        """Counts over all processes, and losses whose mean over the processes is the loss over all tokens.

        The load-balance loss weighs this process's probabilities with the rows of all processes. That is what a single device
        computes for the same tokens, which the mean of losses over each process's own rows is not.
        """
        totals = torch.cat([expert_counts(routing), routing.expert_index.new_full((1,), logits.shape[0])]).long()
        with naming_failures(self.group):
            dist.all_reduce(totals, group=self.group)
        counts, tokens = totals[:-1], totals[-1]
        share = logits.shape[0] / tokens.clamp(min=1).to(logits.dtype)
        balance = load_balance_loss(logits, routing, scoring=config.scoring, counts=counts)  # per token here, twice
        return RouterOutput(
            logits, routing, counts.int(), balance * share * share * self.processes, router_z_loss(logits) * share * self.processes
        )
