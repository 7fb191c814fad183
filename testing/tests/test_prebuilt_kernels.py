"""Routing and dispatch need no kernel that is not built with the project, whatever the matrix routes: asked of their host halves."""

import contextlib
from itertools import product

import pytest
import torch

import cute_runtime
import dispatch
from cute_runtime import checks
from cute_runtime.emulator import h100_properties
from dispatch import chunk_counts, count_hopper, gather_sum_hopper, plan_hopper
from routing import hopper, rounding_hopper, scores_hopper, top_k_hopper
from testing.matrix.cells import CountCell, LayerCell, RoutingCell, SpeedCell, load_matrix
from testing.matrix.route import route

MATRIX = load_matrix()
CACHES = (
    *(plan_hopper.uniform_launch, plan_hopper._load_plan_few, plan_hopper._load_place, plan_hopper._load_keys, plan_hopper._load_bounds),
    *(
        gather_sum_hopper.kernel,
        top_k_hopper._kernel,
        top_k_hopper.launch_of,
        rounding_hopper._kernel,
        scores_hopper._scores_kernel,
        scores_hopper._grad_kernel,
    ),
    *(chunk_counts.multiprocessors, count_hopper._kernel),
)


@pytest.fixture
def loaded(monkeypatch):
    """The variants that host halves ask for while CPU tensors pass for those of an sm_90 GPU; their kernels do nothing."""
    variants = set()

    def load(variant):
        variants.add(variant)
        return lambda *args: None

    for cache in CACHES:
        cache.cache_clear()
    for place in (checks, cute_runtime):
        monkeypatch.setattr(place, "is_supported_device", lambda device: True)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(cute_runtime, "load", load)
    monkeypatch.setattr(cute_runtime, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100_properties())
    yield variants
    for cache in CACHES:
        cache.cache_clear()


def experts_of(spec):
    """The numbers of experts that cells route to in this way."""
    cells = [cell for cell in MATRIX.cells if not isinstance(cell, CountCell) and cell.routing == spec]
    return {cell.experts if isinstance(cell, RoutingCell) else cell.thiek.E for cell in cells}


def route_plan_and_sum(spec, experts, tokens):
    """As a layer and the checks of its routing do."""
    logits = torch.zeros(tokens, experts, requires_grad=True)
    bias = torch.zeros(experts) if spec.selection_bias else None
    routed = route(logits, 4, spec, bias, 0)
    sizes = {"num_tokens": tokens, "num_experts": experts, "slots_per_token": routed.slots_per_token}
    plan = dispatch.plan(routed.token_index, routed.expert_index, **sizes)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = torch.zeros(routed.score.shape[0], 16, dtype=dtype)
        for score in (None, routed.score.detach()):
            dispatch.gather_sum(rows, score, plan, backend="hopper")
    routed.score.sum().backward()


def test_every_routing_of_the_matrix_finds_its_kernels(loaded):
    built = {*cute_runtime.prebuilt_variants(["dispatch", "routing"])}
    routings = {cell.routing for cell in MATRIX.cells if isinstance(cell, LayerCell | RoutingCell | SpeedCell)}
    assert len(routings) > 15
    for spec in routings:
        for experts, tokens in product(experts_of(spec), (200, 1100)):
            route_plan_and_sum(spec, experts, tokens)
            assert loaded - built == set(), (spec.name, experts, tokens)
    kernels = {variant.kernel for variant in loaded}
    assert len(kernels) == 12, "six of dispatch and six of routing: an empty list does not pass"
    assert len(loaded) > 30


def test_every_count_of_the_matrix_finds_its_kernels(loaded):
    built = {*cute_runtime.prebuilt_variants(["dispatch"])}
    for cell in MATRIX.cells_of("count_cumsum"):
        for dtype in (torch.int32, torch.int64):
            dispatch.count_cumsum(torch.zeros(100, dtype=dtype), cell.experts, backend="hopper")
    assert len(loaded) == 4
    assert loaded <= built
