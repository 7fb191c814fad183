"""``python -m testing.measure.sanitized CASE DEVICE SEED``: kernels of one family on small shapes, for a sanitizer to watch.

Each case checks its values against float64 (integers against their definition), with poisoned outputs. Between them the cases have tails,
experts with no row, with one and with all rows, sentinels, and several tiles a block. On a CPU they run on PyTorch.
"""

import contextlib
import faulthandler
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import numpy as np
import torch

import cute_runtime
import dispatch
from dispatch import gather_sum_hopper, travel
from routing import Routing, linalg, router_logits_hopper
from routing.kernels.logits_tiles import TILES
from sonicmoe import accuracy, backends, cases, kernel_cases
from sonicmoe.backends import hopper, hopper_backward
from sonicmoe.kernel_cases import Case, assert_near
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, SMALL, TALL, WIDE, Tile
from sonicmoe.thiek import Thiek
from testing.matrix import inputs
from testing.matrix.cells import RoutingSpec
from testing.matrix.checks_dispatch import check_plan
from testing.matrix.checks_layer import poisoned
from testing.matrix.checks_routing import check_rounding, check_top_k
from testing.matrix.results import Check
from testing.matrix.route import route
from testing.measure.dispatch import LARGEST_LOGIT_ERROR

RIGHT = "values right"
"""The last line of a process whose values were right."""
TIMEOUT_S = 300
"""After which a process ends itself; the sanitizer's end would leave it running."""
STOPPED = "Timeout ("
"""What it prints on stderr then."""

COUNTS = [
    (136, 72, 100, (5, 0, 130, 64, 1, 300, 128, 0)),
    (512, 264, 700, (0, 1000, 0)),
    (8, 8, 9, (3, 0, 9)),
    (64, 1032, 300, (200,) * 20),
]
"""H, I, T and the experts' rows; the last one gives a block up to three tiles where there are 132 multiprocessors. With
more than four of activation_backward's, racecheck reports the schedule's slots, whose order it does not follow; no case may force that."""
FEW_ROWS = (264, 1032, 30, (8, 0, 1) * 8)
"""For the tile of decoding."""
TOP_K = [
    (RoutingSpec("softmax"), "normal", 70, 33, 5),
    (RoutingSpec("softmax"), "normal", 1, 1, 1),
    (RoutingSpec("softmax_topk", scoring="softmax_topk", renormalize=True), "ties", 1100, 140, 9),
    (RoutingSpec("biased", scoring="sigmoid", renormalize=True, scale=2.5, selection_bias=0.1), "normal", 129, 64, 6),
    (RoutingSpec("groups", scoring="sigmoid", selection_bias=0.1, num_groups=8, groups_per_token=4), "normal", 65, 64, 6),
    (RoutingSpec("softmax in groups", num_groups=11, groups_per_token=3, group_score="max"), "normal", 70, 33, 5),
]
"""With load, T, E and K."""
MODES = ("nearest", "up", "down", "stochastic", "balanced")
PLANS = [(70, 33, 5), (1100, 140, 9), (600, 1500, 2), (40, 5, 1), (1, 1, 1)]
"""T, E and K: few slots, many, and experts that take two passes."""
SUMS = [(1, 8, 1), (63, 2056, 17), (257, 264, 3)]
"""T, H and K."""
LOGITS = [(130, 200, 70), (300, 584, 129), (1, 8, 1)]
"""T, H and E."""
LAYER = Thiek(300, 264, 136, 9, 3)


def router_logits(device: str, seed: int) -> None:
    """In every tile and number of parts."""
    for T, H, E in LOGITS:
        x, weight = (torch.randn(rows, H, generator=_generator(device, seed), device=device).bfloat16() for rows in (T, E))
        results = [linalg.linear(x, weight)]
        for tile in TILES if _backend(device) == "hopper" else ():
            for parts in tile.parts:
                results.append(torch.empty_like(results[0]))
                router_logits_hopper._kernel(x.dtype, tile)(x, weight, results[-1], parts)
        for number, got in enumerate(results):
            error = (got - x.double() @ weight.double().mT).norm(dim=1)
            typical = x.double().norm(dim=1) * weight.double().norm() / H**0.5  # one logit may vanish by chance
            assert (error <= LARGEST_LOGIT_ERROR * typical).all(), f"logits {number} of {T}, {H}, {E}: {(error / typical).max():.1e}"


def top_k(device: str, seed: int) -> None:
    """Choice, scores and their gradient."""
    for spec, load, T, E, K in TOP_K:
        _route(spec, load, T, E, K, device, seed)


def token_rounding(device: str, seed: int) -> None:
    """The same in every mode."""
    for mode, scoring in itertools.product(MODES, ("softmax", "sigmoid")):
        spec = RoutingSpec(mode, method="token_rounding", scoring=scoring, renormalize=True, tile_m=16, mode=mode)
        _route(spec, "skewed", 300, 20, 3, device, seed)


def _route(spec: RoutingSpec, load: str, T: int, E: int, K: int, device: str, seed: int) -> None:
    logits, bias = inputs.router_logits(load, T, E, seed), inputs.selection_bias(spec, E, seed)
    leaf = torch.from_numpy(logits).to(device).requires_grad_()
    routed = route(leaf, K, spec, None if bias is None else torch.from_numpy(bias).to(device), seed)
    _hold(check_top_k(routed, logits, spec, K, bias) if spec.method == "top_k" else check_rounding(routed, logits, spec, K))
    used = routed.expert_index < E
    token, weight = routed.token_index[used].long(), torch.randn(len(used), generator=_generator(device, seed), device=device)
    routed.score.backward(weight)
    exact = leaf.detach().double().requires_grad_()
    score = (exact.sigmoid() if spec.scoring == "sigmoid" else exact.softmax(1))[token, routed.expert_index[used].long()]
    if spec.renormalize:
        score = score / torch.zeros_like(exact[:, 0]).index_add(0, token, score)[token]
    (spec.scale * score).backward(weight[used].double())
    assert_near(leaf.grad, exact.grad, f"gradient of {spec.name}")


def plan(device: str, seed: int) -> None:
    """count_cumsum and plan, K slots a token and in any order, of sentinels and of one expert alone."""
    for (T, E, K), dtype, alone in itertools.product(PLANS, (torch.int32, torch.int64), (False, True)):
        expert = torch.randint(-1, E + 1, (T * K,), generator=_generator(device, seed), dtype=dtype, device=device)
        if alone:
            expert.fill_(E - 1)
        counts = np.bincount(_used(expert, E), minlength=E)
        for got, want in zip(dispatch.count_cumsum(expert, E), (counts, np.cumsum(counts)), strict=True):
            assert np.array_equal(got.cpu().numpy(), want), f"count_cumsum of {T * K}, {E}"
        token = torch.arange(T * K, dtype=dtype, device=device) // K
        for order, k in ((slice(None), K), (torch.randperm(T * K, generator=_generator(device, seed), device=device), None)):
            routing = Routing(token[order], expert, None, T, E, k)
            made = dispatch.plan(routing.token_index, expert, num_tokens=T, num_experts=E, slots_per_token=k)
            _hold(check_plan(made, routing))


def gather_sum(device: str, seed: int) -> None:
    """Rows of several widths in both forms, with and without score; what no slot owns is NaN."""
    for (T, H, K), k_each, scored in itertools.product(SUMS, (True, False), (True, False)):
        generator = _generator(device, seed)
        expert = torch.randint(-1, 8, (T * K,), generator=generator, dtype=torch.int32, device=device)
        token = torch.arange(T * K, dtype=torch.int32, device=device) // K
        made = dispatch.plan(token, expert, num_tokens=T, num_experts=8, slots_per_token=K if k_each else None)
        rows, score = torch.randn(T * K, H, generator=generator, device=device), torch.rand(T * K, generator=generator, device=device)
        rows[made.offsets[-1] :] = float("nan")
        own = made.slot_to_row >= 0
        for dtype in (torch.bfloat16, torch.float32):
            terms = rows.to(dtype)[made.slot_to_row[own]].double() * (score[own, None].double() if scored else 1)
            want = torch.zeros(T, H, dtype=torch.float64, device=device).index_add_(0, token[own], terms)
            assert_near(dispatch.gather_sum(rows.to(dtype), score if scored else None, made), want, f"sums of {T}, {H}, {K}")


def travels(device: str, seed: int) -> None:
    """dispatch.travel's three steps beside PyTorch's, bit by bit."""
    T, E, K, processes = 700, 12, 3, 4
    backend = _backend(device)
    for chunks, dtype, ordered in itertools.product((1, 3), (torch.int32, torch.int64), (True, False)):
        expert = torch.randint(-1, E + 2, (T * K,), generator=_generator(device, seed), dtype=dtype, device=device)
        token = None
        if not ordered:
            token = torch.randperm(T * K, generator=_generator(device, seed), device=device).to(dtype) // K
            token[5], token[7] = -1, T
        spread = travel.Spread(expert, token, T, E, K if ordered else None, processes, chunks)
        pairs = [travel.pairs(spread, backend=one) for one in (backend, "reference")]
        _same(*pairs, "pairs")
        sizes = {"num_tokens": T, "num_experts": processes * chunks}
        slots = dispatch.plan(token, pairs[1][0], **sizes, slots_per_token=spread.slots_per_token)
        copies = dispatch.plan(None, pairs[1][1], **sizes, slots_per_token=processes)
        score = torch.rand(T * K, generator=_generator(device, seed), device=device)
        used = int(slots.offsets[-1])
        labels = [travel.labels(spread, score, slots, copies, backend=one)[:used] for one in (backend, "reference")]
        _same(*zip(labels, strict=True), "labels")
        runs = torch.tensor([[used // 3, used, used + 9], [0, 0, -5], [0, 40, -1]], dtype=torch.int32, device=device)
        arrivals = [
            travel.unpack(labels[1], travel.Arrivals(*runs), used + 9, E // processes, torch.float32, backend=one)
            for one in (backend, "reference")
        ]
        _same(*arrivals, "arrivals")


def up_projection(tile: Tile) -> Callable[[str, int], None]:
    """With z and with a bias."""

    def run(device: str, seed: int) -> None:
        for counts, bias in itertools.product([FEW_ROWS] if tile is SMALL else COUNTS, (False, True)):
            case, store_z = _case(counts, device, seed, bias), not bias and tile is not SMALL
            with _taking(hopper, "up_tile", tile):
                kernel_cases.check_up_projection(case, _operations(device).up_projection, store_z=store_z)

    return run


def down_projection(tile: Tile) -> Callable[[str, int], None]:
    """With and without bias."""

    def run(device: str, seed: int) -> None:
        for counts, bias in itertools.product([FEW_ROWS] if tile is SMALL else _turned(), (False, True)):
            with _taking(hopper, "down_tile", tile):
                kernel_cases.check_down_projection(_case(counts, device, seed, bias), _operations(device).down_projection)

    return run


def activation_backward(tile: Tile) -> Callable[[str, int], None]:
    """And score_grad, with and without bias; dz in memory of its own and in that of z."""

    def run(device: str, seed: int) -> None:
        for counts, over in itertools.product(COUNTS, (False, True)):
            case = _case(counts, device, seed, bias=over)
            with _taking(hopper_backward, "activation_backward_tile", tile):
                kernel_cases.check_activation_backward(case, _operations(device).activation_backward, overwrite_z=over)

    return run


def weight_grads(device: str, seed: int) -> None:
    """dw_down and dw_up, stored and added into float32, and the biases' gradients."""
    operations = _operations(device).down_weight_grad, _operations(device).up_weight_grad
    for counts in COUNTS:
        kernel_cases.check_weight_grads(_case(counts, device, seed), *operations, bias=True)
        kernel_cases.check_added_weight_grads(_case(counts, device, seed), *operations)


def dx_rows(tile: Tile) -> Callable[[str, int], None]:
    def run(device: str, seed: int) -> None:
        for counts in _turned():
            with _taking(hopper_backward, "dx_tile", tile):
                kernel_cases.check_dx_rows(_case(counts, device, seed), _operations(device).dx_rows)

    return run


def layer(device: str, seed: int) -> None:
    """A training step whose operations are called one by one, then one whose launches are one call in each direction, and an inference."""
    case = cases.make_case(LAYER, seed=seed, device=device, bias=True)
    model, x = case.layer(), case.x.detach().requires_grad_()
    result, routing = cases.run(model, case)
    wrong = accuracy.failures(accuracy.measure_all(result, case.oracle(routing)), accuracy.THRESHOLDS[case.x.dtype])
    assert not wrong, wrong[0]
    out = model(x)
    assert (type(out.grad_fn).__name__ == "_LayerBackward") == (_backend(device) == "hopper"), "not at once"
    at_once = out, *torch.autograd.grad(out, [x, *model.parameters()], case.dout)
    _same(at_once, tuple(result.values()), "training at once", "one by one")
    with torch.no_grad():
        _same((model(case.x),), (result["o"],), "inference", "training")


UP = {"tall": TALL, "broad": BROAD, "pair": PAIR, "wide": WIDE, "small": SMALL}
DOWN = {"tall": TALL, "broad": BROAD, "wide": WIDE, "small": SMALL}
BACK = {"wide": WIDE, "pair": PAIR, "lone": LONE, "tall": TALL}
DX = {"tall": TALL, "wide": WIDE, "broad": BROAD}
"""The tiles that kernels/tiles.py may choose."""

CASES: dict[str, Callable[[str, int], None]] = {
    "router-logits": router_logits,
    "top-k": top_k,
    "token-rounding": token_rounding,
    "plan": plan,
    "gather-sum": gather_sum,
    "travel": travels,
    **{f"up-{name}": up_projection(tile) for name, tile in UP.items()},
    **{f"down-{name}": down_projection(tile) for name, tile in DOWN.items()},
    **{f"activation-backward-{name}": activation_backward(tile) for name, tile in BACK.items()},
    "weight-grads": weight_grads,
    **{f"dx-rows-{name}": dx_rows(tile) for name, tile in DX.items()},
    "layer": layer,
}
"""By name: functions of the device and a seed, which raise where a value is wrong."""


def beyond(device: str, seed: int) -> None:
    """Sums rows of y that are not there."""
    y, score = torch.zeros(64, 128, dtype=torch.bfloat16, device=device), torch.ones(64, device=device)
    slot_to_row = torch.full((64,), 10**6 + seed % 64, dtype=torch.int32, device=device)
    gather_sum_hopper.kernel(y.dtype, True, score.dtype)(y, score, slot_to_row, None, None, torch.empty_like(y), 1, 0)


FAULTS = {"beyond": beyond}
"""What memcheck must find."""


def _generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _backend(device: str) -> str:
    return "hopper" if cute_runtime.is_supported_device(torch.device(device)) else "reference"


def _operations(device: str) -> ModuleType:
    return backends.load(_backend(device))


def _case(counts: tuple, device: str, seed: int, bias: bool = False) -> Case:
    return Case(*counts, dtype=torch.bfloat16, bias=bias, device=device, seed=seed)


def _turned() -> list[tuple]:
    """COUNTS for the kernels whose columns are H."""
    return [(I, H, T, counts) for H, I, T, counts in COUNTS]


@contextlib.contextmanager
def _taking(module: ModuleType, rule: str, tile: Tile) -> Iterator[None]:
    """The kernels' tile whatever the sizes."""
    kept = hopper._up_launch, hopper._down_launch  # which remember their choice by sizes
    for cache in kept:
        cache.cache_clear()
    with mock.patch.object(module, rule, return_value=tile):
        yield
    for cache in kept:
        cache.cache_clear()


def _used(expert: torch.Tensor, experts: int) -> np.ndarray:
    ids = expert.cpu().numpy()
    return ids[(ids >= 0) & (ids < experts)]


def _same(got: tuple, want: tuple, name: str, other: str = "PyTorch") -> None:
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True)), f"{name}: other bits than {other}"


def _hold(checks: list[Check]) -> None:
    for check in checks:
        assert check.passed, f"{check.name}: {check.why}"


def main(name: str, device: str, seed: str) -> None:
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    with poisoned():
        (CASES | FAULTS)[name](device, int(seed))
        if device != "cpu":
            torch.cuda.synchronize()
    print(RIGHT, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
