"""Suite ``dispatch``: counting, the plan, and all of logits -> plan as a share of the layer's forward.

count_cumsum must be faster than ``torch.bincount`` and ``cumsum``; bincount waits for the host and cannot be captured, so that in a
CUDA graph PyTorch's fastest that can be, scatter_add and cumsum, is the mark too. Routing and dispatch must take under 6 % of the
forward at (32768,4096,1024,128,8), inference or training, whichever is shorter.
Values are compared before anything is timed. N slots, T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any

import torch

import dispatch
from routing import RouterConfig
from sonicmoe.thiek import Thiek
from testing.measure.clock import Call, per_call, until_return
from testing.measure.items import NEEDS_GPU, Bound, Item, Options, cell, differing

LARGEST_SHARE = 0.06
COUNTS = tuple((slots, experts) for slots in (262_144, 2_097_152) for experts in (128, 50_000))
"""(N, E)."""
PLANS = (
    (64, 128, 8, True),
    (32_768, 128, 8, True),
    (4096, 256, 8, True),
    (32_768, 256, 16, True),
    (32_768, 50_000, 8, True),
    (32_768, 128, 8, False),
    (16_384, 256, 8, False),
)
"""(T, E, K, whether slot t*K + j belongs to token t)."""


def items(options: Options) -> list[Item]:
    counts, plans = (((1000, 16),), ((100, 8, 2, True), (100, 8, 2, False))) if options.quick else (COUNTS, PLANS)
    thiek = options.thiek(32768, 4096, 1024, 128, 8)
    found = []
    for slots, experts in counts:
        for dtype in (torch.int32, torch.int64):
            name = f"dispatch/count_cumsum/{slots}-{experts}-{str(dtype).removeprefix('torch.')}"
            found.append(Item(f"{name}/eager", _counting(options, f"{name}/eager", slots, experts, dtype, in_graph=False)))
            run = _counting(options, f"{name}/graph", slots, experts, dtype, in_graph=True)
            found.append(Item(f"{name}/graph", run, "" if options.on_gpu else f"a CUDA graph {NEEDS_GPU}"))
    for tokens, experts, k, uniform in plans:
        name = f"dispatch/plan/{tokens}-{experts}-{k}{'' if uniform else '-any-order'}"
        found.append(Item(name, _planning(options, name, tokens, experts, k, uniform)))
    for router in (RouterConfig(k=thiek.K), options.rounding(thiek.K)):
        name = f"dispatch/logits-to-plan/{router.method}"
        found.append(Item(name, _share(options, name, thiek, router)))
    return found


def _draw(options: Options, count: int, size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator(options.device).manual_seed(options.seed)
    return torch.randint(size, (count,), generator=generator, device=options.device, dtype=dtype)


def _counting(
    options: Options, name: str, slots: int, experts: int, dtype: torch.dtype, *, in_graph: bool
) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        ids = _draw(options, slots, experts, dtype)

        def bincount() -> torch.Tensor:
            return torch.bincount(ids, minlength=experts).cumsum(0)

        _, running = dispatch.count_cumsum(ids, experts)
        if wrong := int((running != bincount()).sum()):
            raise ValueError(f"count_cumsum differs from torch.bincount + cumsum for {wrong} of {experts} experts")
        calls = {"ours": Call(lambda: dispatch.count_cumsum(ids, experts), in_graph=in_graph), "bincount": Call(bincount)}
        if in_graph:
            calls["scatter_add"] = Call(lambda: dispatch.count_cumsum(ids, experts, backend="reference"), in_graph=True)
        times = per_call(calls, options)
        ours = times.pop("ours")
        mark, mark_ms = min(((other, time.ms) for other, time in times.items()), key=lambda pair: pair[1])
        return [
            cell(
                options,
                name,
                mode=f"count_cumsum, {'graph' if in_graph else 'eager'}",
                bound=Bound(ours.ms / mark_ms, f"of torch's {mark} + cumsum", 1.0),
                dtype=str(dtype).removeprefix("torch."),
                slots=slots,
                experts=experts,
                ms=ours.ms,
                ms_spread=ours.ms_spread,
                **{f"{other}_ms": time.ms for other, time in times.items()},
            )
        ]

    return run


def _planning(options: Options, name: str, tokens: int, experts: int, k: int, uniform: bool) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        token = torch.arange(tokens, device=options.device, dtype=torch.int32).repeat_interleave(k)
        expert = _draw(options, tokens * k, experts)
        sizes = {"num_tokens": tokens, "num_experts": experts, "slots_per_token": k if uniform else None}

        def ours() -> dispatch.DispatchPlan:
            return dispatch.plan(token, expert, **sizes)

        def reference() -> dispatch.DispatchPlan:
            return dispatch.plan(token, expert, **sizes, backend="reference")

        names = dispatch.DispatchPlan._fields[: 4 if uniform else 6]  # a plan of K slots a token lists no slots
        wrong = [field for field, got, want in zip(names, ours(), reference(), strict=False) if differing(got, want)]
        if wrong:
            raise ValueError(f"plan's {', '.join(wrong)} differ from PyTorch's")
        calls = {"ours": Call(ours, in_graph=options.on_gpu), "eager": Call(ours)}
        calls |= {"reference": Call(reference, 5, in_graph=options.on_gpu), "reference_eager": Call(reference, 5)}
        times = per_call(calls, options)
        host = until_return({"host": ours}, options)["host"]
        return [
            cell(
                options,
                name,
                mode="plan",
                dtype="int32",
                tokens=tokens,
                experts=experts,
                per_token=k,
                ms=times["ours"].ms,
                ms_spread=times["ours"].ms_spread,
                eager_ms=times["eager"].ms,
                host_ms=host.ms,
                reference_ms=times["reference"].ms,
                reference_eager_ms=times["reference_eager"].ms,
            )
        ]

    return run


def _share(options: Options, name: str, thiek: Thiek, router: RouterConfig) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        case, layer = options.problem(thiek, router)
        with torch.no_grad():
            logits = layer.router(case.x)

        def to_plan() -> dispatch.DispatchPlan:
            routing = router.route(logits)
            sizes = {"num_tokens": routing.num_tokens, "num_experts": routing.num_experts, "slots_per_token": routing.slots_per_token}
            return dispatch.plan(routing.token_index, routing.expert_index, **sizes)

        def inference() -> None:
            with torch.no_grad():
                layer(case.x)

        calls = {"ours": Call(to_plan, 10, in_graph=options.on_gpu), "eager": Call(to_plan, 10)}
        times = per_call({**calls, "inference": Call(inference, 1), "forward": Call(lambda: layer(case.x), 1)}, options)
        shortest = min(times[mode].ms for mode in ("inference", "forward"))
        return [
            cell(
                options,
                name,
                mode="routing + dispatch",
                bound=Bound(times["ours"].ms / shortest, "of the layer's forward", LARGEST_SHARE),
                thiek=thiek,
                routing=router.method,
                ms=times["ours"].ms,
                ms_spread=times["ours"].ms_spread,
                eager_ms=times["eager"].ms,
                inference_ms=times["inference"].ms,
                forward_ms=times["forward"].ms,
            )
        ]

    return run
