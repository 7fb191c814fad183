"""Suite ``dispatch``: the router's product, counting, the plan, and all of logits -> plan as a share of the layer's forward.

count_cumsum must be faster than ``torch.bincount`` and ``cumsum``; bincount waits for the host and cannot be captured, so that in a
CUDA graph PyTorch's fastest that can be, scatter_add and cumsum, is the mark too. Routing and dispatch must take under 6 % of the
forward at (32768,4096,1024,128,8), inference or training, whichever is shorter.
Values are compared before anything is timed. N slots, T tokens, H hidden size, E experts, K experts per token.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

import dispatch
from routing import RouterConfig, linalg
from sonicmoe.thiek import Thiek
from testing.measure.clock import Call, per_call, until_return
from testing.measure.items import NEEDS_GPU, Bound, Item, Options, cell, differing
from testing.measure.kernels import SHAPES, machine

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

LARGEST_LOGIT_ERROR = 5e-5
"""Of a token's logits in float64: the tensor cores' float32 sums. Rounding to bfloat16 would cost thirty times that."""
PRODUCTS = (
    *dict.fromkeys((thiek.T, thiek.H, thiek.E) for thiek in SHAPES),
    *((tokens, *sizes) for sizes in ((4096, 8), (2048, 128), (7168, 256)) for tokens in (1, 16, 64, 512)),
)
"""(T, H, E): the speed cells', and decoding in Mixtral-8x7B, Qwen3-30B-A3B and DeepSeek-V3."""


def items(options: Options) -> list[Item]:
    counts, plans = (((1000, 16),), ((100, 8, 2, True), (100, 8, 2, False))) if options.quick else (COUNTS, PLANS)
    thiek = options.thiek(32768, 4096, 1024, 128, 8)
    found = []
    for sizes in ((48, 32, 8),) if options.quick else PRODUCTS:
        name = f"dispatch/router-logits/{'-'.join(map(str, sizes))}"
        found.append(Item(name, _router_logits(options, name, *sizes)))
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


def _router_logits(options: Options, name: str, tokens: int, hidden: int, experts: int) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        generator = torch.Generator(options.device).manual_seed(options.seed)
        moved = 2 * hidden * (tokens + experts) + 4 * tokens * experts
        draws = 1 if options.quick else max(2, min(20, 2**28 // moved))  # more memory than L2 holds

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, hidden, generator=generator, device=options.device).bfloat16()

        operands = [(normal(tokens), normal(experts)) for _ in range(draws)]
        x, weight = operands[0]
        want = x.double() @ weight.double().mT
        error = ((linalg.linear(x, weight) - want).norm(dim=1) / want.norm(dim=1)).max().item()
        del want

        def of(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
            turns = itertools.cycle(operands)
            return lambda: function(*next(turns))

        def pytorch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linalg.matmul(x, weight.mT)

        calls = {key: Call(of(function), in_graph=options.on_gpu) for key, function in (("ours", linalg.linear), ("mm", pytorch))}
        times = per_call(calls, options)
        host = until_return({"ours": of(linalg.linear), "mm": of(pytorch)}, options)
        flops_per_ms, bytes_per_ms = machine(options)
        floor_ms = max(2 * tokens * hidden * experts / flops_per_ms, moved / bytes_per_ms)
        return [
            cell(
                options,
                name,
                mode="router logits",
                bound=Bound(error, "relative error of the worst token", LARGEST_LOGIT_ERROR, "at most", everywhere=True),
                tokens=tokens,
                hidden=hidden,
                experts=experts,
                ms=times["ours"].ms,
                ms_spread=times["ours"].ms_spread,
                mm_ms=times["mm"].ms,
                floor_ms=floor_ms,
                floor_share=floor_ms / times["ours"].ms,
                host_ms=host["ours"].ms,
                mm_host_ms=host["mm"].ms,
            )
        ]

    return run


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
