"""Suite ``step``: whole training steps compiled and captured, no waiting for the host, and the same bits twice.

The first two train a model of two layers in a row, so that every gradient of a layer takes part.

- compiled: ``torch.compile(model, fullgraph=True)`` trains with eager's numbers: after a few steps of AdamW on fresh tokens the losses are
  eager's and the weights lie where eager's do, by the distance that they moved. (Inductor may round once where eager rounds twice.)
- graph: a step, forward, loss, backward and fused AdamW, captured once in a CUDA graph and replayed on fresh tokens with other routings:
  the bits of eager steps.
- no-wait: forward, training forward and backward under ``torch.cuda.set_sync_debug_mode("error")``.
- twice: output and gradients of two runs, bit by bit.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from routing import RouterConfig
from sonicmoe import cases
from sonicmoe.cases import Case
from sonicmoe.moe import MoE
from sonicmoe.thiek import Thiek
from testing.measure.items import NEEDS_GPU, Bound, Item, Options, cell, differing

STEPS = 4
LEARNING_RATE = 1e-3
LARGEST_DRIFT = 0.05
"""Of compiled weights from eager's, by the distance that eager's moved: a step is eight bfloat16 roundings of a weight long."""
LARGEST_LOSS_DRIFT = 1e-3


def items(options: Options) -> list[Item]:
    thiek = options.thiek(4096, 1024, 512, 64, 8)
    needs_gpu = "" if options.on_gpu else NEEDS_GPU
    found = []
    for router in (RouterConfig(k=thiek.K), options.rounding(thiek.K)):
        for what, measure, missing in (
            ("compiled", _compiled, ""),
            ("graph", _captured, needs_gpu),
            ("no-wait", _without_waiting, needs_gpu),
            ("twice", _twice, ""),
        ):
            name = f"step/{what}/{router.method}"
            found.append(Item(name, _item(measure, options, name, thiek, router), missing))
    return found


def _item(measure: Callable[..., list[dict[str, Any]]], *arguments: Any) -> Callable[[], list[dict[str, Any]]]:
    return lambda: measure(*arguments)


def _compiled(options: Options, name: str, thiek: Thiek, router: RouterConfig) -> list[dict[str, Any]]:
    case, model = _model(options, thiek, router)
    backend = "aot_eager" if options.quick else "inductor"
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    torch._dynamo.reset()
    losses = [
        _train(eager, eager, case, options),
        _train(compiled, torch.compile(compiled, fullgraph=True, backend=backend), case, options),
    ]
    numbers = _compare(model, eager, compiled, *losses)
    about = {"mode": "torch.compile", "thiek": thiek, "routing": router.method, "compiler": backend, "steps": STEPS, **numbers}
    drift = Bound(numbers["drift"], "of the way that eager's weights moved", LARGEST_DRIFT, "at most", everywhere=True)
    loss = Bound(numbers["loss_drift"], "of eager's loss", LARGEST_LOSS_DRIFT, "at most", everywhere=True)
    return [cell(options, f"{name}/weights", bound=drift, **about), cell(options, f"{name}/losses", bound=loss, **about)]


def _captured(options: Options, name: str, thiek: Thiek, router: RouterConfig) -> list[dict[str, Any]]:
    case, model = _model(options, thiek, router)
    eager, captured = copy.deepcopy(model), copy.deepcopy(model)
    losses = [_train(eager, eager, case, options), _train_captured(captured, case, options)]
    numbers = _compare(model, eager, captured, *losses)
    routings = len({tuple(_counts(model[0], x)) for x, _ in _batches(case, options)})
    if routings < 2:
        raise ValueError(f"{STEPS} batches of fresh tokens have {routings} routings: must be several")
    bound = Bound(numbers["differing"], "weights and losses with other bits than eager's", 0, "at most", everywhere=True)
    about = {"thiek": thiek, "routing": router.method, "steps": STEPS, "routings": routings}
    return [cell(options, name, mode="CUDA graph", bound=bound, **about, **numbers)]


def _model(options: Options, thiek: Thiek, router: RouterConfig) -> tuple[Case, torch.nn.Sequential]:
    case, layer = options.problem(thiek, router)
    return case, torch.nn.Sequential(layer, copy.deepcopy(layer))


def _counts(layer: MoE, x: torch.Tensor) -> list[int]:
    with torch.no_grad():
        return layer(x, return_router=True)[1].counts.tolist()


def _batches(case: Case, options: Options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) of each step."""
    for step in range(STEPS):
        fresh = case.with_fresh_tokens(options.seed + 1 + step)
        yield fresh.x, fresh.dout


def _optimizer(model: torch.nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=options.on_gpu)


def _loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out.float() - target.float()).square().mean()


def _train(model: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], case: Case, options: Options) -> torch.Tensor:
    """The losses (STEPS,) of training ``model``, called as ``forward``."""
    optimizer, losses = _optimizer(model, options), []
    for x, target in _batches(case, options):
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(forward(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def _train_captured(model: torch.nn.Module, case: Case, options: Options) -> torch.Tensor:
    """The same by replays of one captured step."""
    optimizer, x, target = _optimizer(model, options), case.x.clone(), case.dout.clone()
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # loads the kernels and makes the optimizer's state
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
            for state in optimizer.state[parameter].values():
                state.zero_()
    losses = []
    for fresh_x, fresh_target in _batches(case, options):
        x.copy_(fresh_x)
        target.copy_(fresh_target)
        graph.replay()
        losses.append(loss.detach().clone())
    return torch.stack(losses)


def _compare(
    start: torch.nn.Module, want: torch.nn.Module, got: torch.nn.Module, want_losses: torch.Tensor, got_losses: torch.Tensor
) -> dict[str, Any]:
    """How far two trained models and their losses lie apart; every weight must have moved."""
    three = list(zip(*([value.detach() for value in model.parameters()] for model in (start, want, got)), strict=True))
    return {
        "drift": _largest([_drift(*(value.double() for value in values)) for values in three]),
        "loss_drift": _largest(((got_losses - want_losses).abs() / want_losses.abs()).tolist()),
        "differing": differing(want_losses, got_losses) + sum(differing(one, other) for _, one, other in three),
        "losses": want_losses.tolist(),
    }


def _largest(numbers: list[float]) -> float:
    """The maximum; not a number where one is not."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _drift(start: torch.Tensor, want: torch.Tensor, got: torch.Tensor) -> float:
    moved = (want - start).norm().item()
    if not moved > 0:
        raise ValueError("eager training did not move every weight")
    return (got - want).norm().item() / moved


def _without_waiting(options: Options, name: str, thiek: Thiek, router: RouterConfig) -> list[dict[str, Any]]:
    case, layer = options.problem(thiek, router)
    x = case.x.requires_grad_()
    cases.run(layer, case)  # loads the kernels
    out: list[torch.Tensor] = []

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    phases = {
        "inference": inference,
        "training forward": lambda: out.append(layer(x)),
        "backward": lambda: (out[0] if out else layer(x)).backward(case.dout),
    }
    waits = {}
    for phase, run in phases.items():
        torch.cuda.synchronize(options.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            waits[phase] = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    why = "; ".join(f"{phase}: {reason}" for phase, reason in waits.items())
    bound = Bound(len(waits), f"of {len(phases)} phases wait for the GPU", 0, "at most", everywhere=True)
    return [cell(options, name, mode="no waiting", bound=bound, why=why, thiek=thiek, routing=router.method)]


def _twice(options: Options, name: str, thiek: Thiek, router: RouterConfig) -> list[dict[str, Any]]:
    case, layer = options.problem(thiek, router)
    (first, _), (again, _) = (cases.run(layer, case) for _ in range(2))
    if unfit := [tensor for tensor, value in first.items() if not value.isfinite().all()]:
        raise ValueError(f"{', '.join(unfit)}: has values that are not finite")
    counts = {tensor: differing(first[tensor], again[tensor]) for tensor in first}
    bound = Bound(sum(counts.values()), "elements with other bits in a second run", 0, "at most", everywhere=True)
    why = ", ".join(f"{tensor}: {count}" for tensor, count in counts.items() if count)
    return [cell(options, name, mode="same bits twice", bound=bound, why=why, thiek=thiek, routing=router.method)]
