"""PyTorch's wrappers around `sonicmoe.MoE`: activation checkpointing, autocast, DistributedDataParallel and FSDP2.

The distributed ones run on two processes of this machine with gloo, once for all tests.
"""

import json

import pytest
import torch
import torch.multiprocessing
from torch.utils.checkpoint import checkpoint

from sonicmoe import MoE
from sonicmoe.kernels.variants import layer_variants
from sonicmoe.tests import wrapper_checks
from sonicmoe.tests.kernel_options import kernel_options


def run(folder, processes, device_type):
    """[process][check][tensor]: the error against the layer alone."""
    torch.multiprocessing.spawn(wrapper_checks.run, args=(str(folder), processes, device_type), nprocs=processes)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def gpu_kernels():
    """What the checks in bfloat16 load, for `build_defs.gpu_kernels`."""
    layer = wrapper_checks.make_layer()
    return layer_variants(**kernel_options(layer.activation, layer.gate_up_layout, layer.b_up is not None))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("processes"), wrapper_checks.PROCESSES, "cpu")


def assert_within(errors, name, float64):
    """``float64`` is the limit of checks in float64; the others add float32 gradients."""
    assert {"out", "x", "w_up", "w_down", "b_up", "b_down", "router.weight"} <= errors.keys()
    limit = 1e-6 if "autocast" in name or "mixed" in name else float64
    assert {tensor: error for tensor, error in errors.items() if not error <= limit} == {}


@pytest.mark.parametrize("name", wrapper_checks.CHECKS)
def test_a_wrapped_layer_equals_the_layer_alone(found, name):
    """Outputs and the tokens' gradient bit by bit; parameters' gradients as far as the order of a mean's summands lets them."""
    for process in found:
        assert process[name]["out"] == process[name]["x"] == 0
        assert_within(process[name], name, 1e-14)


@pytest.mark.gpu
def test_a_wrapped_layer_equals_the_layer_alone_on_gpus(tmp_path):
    """One process a GPU, two where there are two. Checks in bfloat16 run on the Hopper kernels."""
    for process in run(tmp_path, min(torch.cuda.device_count(), wrapper_checks.PROCESSES), "cuda"):
        for name, errors in process.items():
            assert_within(errors, name, 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_under_autocast_changes_no_bit(reentrant):
    torch.manual_seed(0)
    layer, x = MoE(16, 8, 6, 2, bias=True), torch.randn(9, 16).requires_grad_()
    leaves = [x, *layer.parameters()]

    def run(function):
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(x)
        out.square().sum().backward()
        return [out, *(leaf.grad for leaf in leaves)]

    expected, got = run(layer), run(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(first, second) for first, second in zip(got, expected, strict=True))
