"""What the ranks of the expert-parallel tests run: each function is called on every rank of a `LocalGroup` of four."""

import contextlib
import dataclasses
import io
import os
import runpy
import sys
from datetime import timedelta
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint as checkpointed

import dispatch
from dispatch import travel
from routing import RouterConfig, Routing
from sonicmoe import MoE, accuracy, cases, cli
from sonicmoe.moe import EXPERT_PARAMETERS
from sonicmoe.parallel import ExpertParallel, expert_parallel, failures, fully_shard_layer, judging, measure
from sonicmoe.parallel.launch import Processes
from sonicmoe.parallel.layer import ExpertParallelism
from sonicmoe.parallel.symmetric import SymmetricMemory
from sonicmoe.tests.local_group import device
from sonicmoe.thiek import Thiek
from sonicmoe.training import text
from sonicmoe.training.config import TrainConfig
from sonicmoe.training.experiment import Experiment
from sonicmoe.training.shares import Alone, Shares

SIZES = Thiek(T=90, H=32, I=16, E=8, K=3)
ROUNDING = {"method": "token_rounding", "tile_m": 8}


@cache
def mesh(expert: int) -> DeviceMesh:
    """(replicas, expert) over all ranks."""
    return init_device_mesh(device().type, (dist.get_world_size() // expert, expert), mesh_dim_names=("replicas", "expert"))


def errors(expert: int, split: list[int], options: dict) -> dict[str, list[float]]:
    """Errors against the float64 oracle, [whole, worst block] of each tensor.

    Args:
        expert: size of the expert-parallel group.
        split: tokens of each of its ranks.
        options: dtype, k, sizes, router (of RouterConfig), everyone_to (the only rank whose experts are chosen), those of
            `cases.make_case`, and those of `expert_parallel`; capacity stands for a `PaddedOverGloo` transport.
    """
    options = {"dtype": "fp64", "k": SIZES.K, "router": {}, "everyone_to": None, **options}
    dtype, k, router, everyone_to = (options.pop(name) for name in ("dtype", "k", "router", "everyone_to"))
    of_case = {name: options.pop(name) for name in ("activation", "bias", "gate_up_layout") if name in options}
    sizes = options.pop("sizes", SIZES)._replace(T=sum(split), K=k)
    router = RouterConfig(k=k, **router)
    case = cases.make_case(sizes, seed=3, dtype=cases.DTYPES[dtype], router=router, device=device(), **of_case)
    if everyone_to is not None:
        owner = torch.arange(sizes.E, device=case.x.device) // (sizes.E // expert) == everyone_to
        weight = case.router_weight.abs() * torch.where(owner, 1.0, -1.0).to(case.x.dtype).unsqueeze(1)
        case = dataclasses.replace(case, x=case.x.abs(), router_weight=weight)
    if "capacity" in options:
        chunk_tokens = -(-max(split) // options.get("chunks", 1))
        options["transport"] = PaddedOverGloo(mesh(expert)["expert"].get_group(), chunk_tokens, options.pop("capacity"))
    got, routing = judging.run(case, mesh(expert)["expert"], split, **options)
    found = accuracy.measure_all(got, case.oracle(routing))
    return {name: [error.whole, error.worst_block] for name, error in found.items()}


class PaddedOverGloo(SymmetricMemory):
    """The transport with sizes on the device, with its operation replaced by gloo: its padding and buffers on a CPU or one GPU."""

    def __init__(self, group: dist.ProcessGroup, chunk_tokens: int, capacity: float | None) -> None:
        self._init(group, chunk_tokens, capacity, _all_to_all_vdev, torch.empty)


def vdev_parts(input_bytes: int, processes: int, *, within_host: bool, threads: int = 512) -> int:
    """How many equal parts torch 2.11's all_to_all_vdev cuts the bytes from each peer into; it stops the device where that is uneven."""
    blocks = -(-input_bytes // (16 * threads * 8))
    blocks = -(-blocks // processes) * processes
    return max(min(blocks, 64 if within_host else 16) // processes, 1)


def _all_to_all_vdev(source: torch.Tensor, out: torch.Tensor, splits: torch.Tensor, offsets: torch.Tensor, group_name: str) -> None:
    """What `torch.ops.symm_mem.all_to_all_vdev` promises, and asks for; everything else in ``out`` becomes NaN."""
    group = dist.distributed_c10d._resolve_process_group(group_name)
    dist.all_to_all_single(offsets[0], splits, group=group)
    offsets[1] = offsets[0].cumsum(0) - offsets[0]
    received = offsets[0].tolist()
    for within_host in (True, False):
        parts = vdev_parts(source.numel(), len(received), within_host=within_host)
        assert all(rows * source.stride(0) % parts == 0 for rows in received), (received, source.shape, parts)
    out.fill_(255)
    dist.all_to_all_single(out[: sum(received)], source[: splits.sum()].contiguous(), received, splits.tolist(), group=group)


def gradients_agree(way: str) -> None:
    """Under activation checkpointing, or for tokens or a router that need no gradient, those that are asked for stay the same."""
    results = []
    for changed in (False, True):
        layer = expert_parallel(_layer(bias=True), mesh(4)["expert"], chunks=2)
        x = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
        x.requires_grad_(not (changed and way == "tokens"))
        layer.router.requires_grad_(not (changed and way == "router"))
        out = checkpointed(layer, x, use_reentrant=False) if changed and way == "checkpoint" else layer(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, layer.router.weight.grad, *(getattr(layer, name).grad for name in EXPERT_PARAMETERS)])
    for plain, other in zip(*results, strict=True):
        if other is not None and not (way == "router" and other is results[1][1]):  # without the router tokens have a smaller gradient
            torch.testing.assert_close(plain, other, rtol=0, atol=0)
    assert (results[1][1] is None) is (way == "tokens")
    assert (results[1][2] is None) is (way == "router")


def rounding_agrees(expert: int, split: list[int], mode: str, tile_m: int, ties: bool) -> bool:
    """Token rounding over all processes chooses what it chooses on one device, token by token and bit by bit."""
    config = RouterConfig(k=2, method="token_rounding", mode=mode, tile_m=tile_m, renormalize=True)
    logits = torch.randn(sum(split), SIZES.E, generator=torch.Generator().manual_seed(5))
    if ties:
        logits = logits.round()
    torch.manual_seed(7)  # of "stochastic" on the first rank
    expected = config.route(logits)
    layer = expert_parallel(MoE(32, 16, SIZES.E, 2, router=config), mesh(expert)["expert"])
    own = judging.own_tokens(split, mesh(expert)["expert"].get_local_rank())
    torch.manual_seed(7 if mesh(expert)["expert"].get_local_rank() == 0 else dist.get_rank())
    got = layer.parallelism.route(config, logits[own], None)
    live = (expected.token_index >= own.start) & (expected.token_index < own.stop) & (expected.expert_index < SIZES.E)
    used = got.expert_index < SIZES.E
    return all(
        torch.equal(one, other)
        for one, other in (
            (got.token_index[used] + own.start, expected.token_index[live]),
            (got.expert_index[used], expected.expert_index[live]),
            (got.score[used], expected.score[live]),
        )
    )


def copies_and_pairs(expert: int) -> tuple[int, int]:
    """(rows that this rank sends, pairs of a token and a rank that has one of its experts)."""
    layer = expert_parallel(_layer(), mesh(expert)["expert"], chunks=2)
    transport, counted = layer.parallelism.transport, []
    announce = transport.announce
    transport.announce = lambda counts, **more: (counted.append(counts), announce(counts, **more))[1]
    x = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    _, router = layer(x, return_router=True)
    owners = router.routing.expert_index.view(40, -1) // (SIZES.E // expert)
    return counted[0][..., 0].sum().item(), sum(len(set(row)) for row in owners.tolist())


class _Operators(TorchDispatchMode):
    """Counts operators that launch something; what is a kernel of ours on a GPU counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        views = (
            "view",
            "_unsafe_view",
            "detach",
            "select",
            "slice",
            "split",
            "unbind",
            "transpose",
            "t",
            "unsqueeze",
            "squeeze",
            "permute",
            "alias",
        )
        name = operator.overloadpacket.__name__
        self.count += not (name in views or name.startswith(("split", "empty", "new_empty")))
        return operator(*args, **(kwargs or {}))

    def one(self, function):
        def call(*args, **options):
            self.count += 1
            with _disable_current_modes():
                return function(*args, **options)

        return call


def operators_of_a_pass(chunks: int) -> tuple[int, int]:
    """What a use of a layer launches, forward and backward, beside router and experts, whose stand-in copies rows and uses each score."""
    layer = expert_parallel(_layer(), mesh(2)["expert"], chunks=chunks)
    x = torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
    expert = torch.arange(48, dtype=torch.int32) % SIZES.E
    routing = Routing(None, expert, torch.rand(48, requires_grad=True), 16, SIZES.E, SIZES.K)
    counter = _Operators()

    def stand_in(rows, w_up, w_down, arrived, **options):
        return _StandIn.apply(rows, arrived.score)

    kernels = {name: counter.one(getattr(travel, name)) for name in ("pairs", "labels", "unpack")}
    with (
        mock.patch.multiple(travel, **kernels),
        mock.patch.object(dispatch, "plan", counter.one(dispatch.plan)),
        mock.patch("sonicmoe.parallel.layer.routed_experts", stand_in),
    ):
        with counter:
            out, _ = layer.parallelism.routed_experts(x, layer.w_up.to_local(), layer.w_down.to_local(), routing)
        forward, dout = counter.count, torch.ones_like(out)
        with counter:
            torch.autograd.grad(out, [x, routing.score], dout)
    return forward, counter.count - forward


class _StandIn(torch.autograd.Function):
    """One operator forward, two backward."""

    @staticmethod
    def forward(ctx, rows, score):
        ctx.slots = score.shape[0]
        return rows.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.clone(), dy.new_zeros(ctx.slots, dtype=torch.float32)


def _layer(seed: int = 0, **options) -> MoE:
    torch.manual_seed(seed)
    return MoE(32, 16, SIZES.E, SIZES.K, dtype=torch.float64, **options)


def shared_expert_runs_meanwhile() -> list[str]:
    """The order in which tokens leave, arrive and the shared expert runs; also checks the sum and its gradient."""
    own = mesh(4)["expert"]
    layer = expert_parallel(_layer(), own)
    transport, events = layer.parallelism.transport, []
    start = transport.start

    def recorded_start(leg, rows, received=None):
        flight = start(leg, rows, received)
        wait = flight.wait
        events.append("start")
        flight.wait = lambda: (events.append("wait"), wait())[1]
        return flight

    transport.start = recorded_start
    weight = torch.full((32,), 2.0, dtype=torch.float64, requires_grad=True)

    def shared(tokens: torch.Tensor) -> torch.Tensor:
        events.append("shared")
        return tokens * weight

    x = torch.randn(12, 32, dtype=torch.float64)
    out = layer(x, shared_expert=shared)
    order = list(events)
    torch.testing.assert_close(out.detach(), layer(x).detach() + 2 * x)
    out.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0))
    return order


def losses_average_to_the_single_device(split: list[int]) -> None:
    """Counts of all processes, and losses whose mean over the processes is the single device's, gradients included."""
    own_mesh = mesh(2)["expert"]
    x = torch.randn(sum(split), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    single = _layer()
    _, expected = single(x, return_router=True)
    (expected.load_balance_loss + expected.z_loss).backward()
    layer = expert_parallel(_layer(), own_mesh)
    _, got = layer(x[judging.own_tokens(split, own_mesh.get_local_rank())], return_router=True)
    torch.testing.assert_close(got.counts, expected.counts)
    (got.load_balance_loss + got.z_loss).backward()
    mean = torch.cat([torch.stack([got.load_balance_loss, got.z_loss]).detach(), layer.router.weight.grad.flatten()])
    dist.all_reduce(mean, group=own_mesh.get_group())
    wanted = torch.cat([torch.stack([expected.load_balance_loss, expected.z_loss]).detach(), single.router.weight.grad.flatten()])
    torch.testing.assert_close(mean / 2, wanted)


def style_equals_function() -> None:
    """parallelize_module with the style: DTensor shards of rank 0's values under the single device's names."""
    model = torch.nn.Sequential(_layer(seed=dist.get_rank(), bias=True, selection_bias=True))
    names = list(model.state_dict())
    parallelize_module(model, mesh(4)["expert"], {"0": ExpertParallel(chunks=2)})
    assert list(model.state_dict()) == names
    expected = _layer(seed=0, bias=True, selection_bias=True)
    for name, parameter in expected.named_parameters():
        own = model[0].get_parameter(name)
        if name != "router.weight":
            assert isinstance(own, DTensor)
            assert own.placements == (Shard(0),)
            assert own.shape == parameter.shape
            assert own.to_local().shape[0] == SIZES.E // 4
            own = own.full_tensor()
        torch.testing.assert_close(own.detach(), parameter.detach(), rtol=0, atol=0)


def trains_with_fsdp(dtype: torch.dtype) -> None:
    """Two steps of SGD under FSDP2, 2 replicas of 2 expert-parallel ranks, are those of one device on all tokens."""
    whole = mesh(2)
    data = whole["replicas", "expert"]._flatten("data")
    x = torch.randn(4, 10, 32, dtype=dtype, generator=torch.Generator().manual_seed(2))
    single, model = (torch.nn.Sequential(torch.nn.Linear(32, 32), _layer()).to(dtype) for _ in range(2))
    torch.manual_seed(9)
    single[0].reset_parameters()
    model.load_state_dict(single.state_dict())
    expert_parallel(model[1], whole["expert"], chunks=2)
    fully_shard_layer(model[1], data_mesh=data, replicas_mesh=whole["replicas"])
    fully_shard(model, mesh=data)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5, foreach=False) for each in (single, model)]
    for _ in range(2):
        single(x.flatten(0, 1)).square().mean().backward()
        model(x[dist.get_rank()]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).full_tensor().detach(), parameter.detach())


def save_on_two(folder: str) -> None:
    """The first expert-parallel pair writes a checkpoint of its layer."""
    own = mesh(2)["expert"]
    layer = expert_parallel(_layer(seed=4, bias=True), own)
    if dist.get_rank() < 2:
        checkpoint.save(layer.state_dict(), checkpoint_id=folder, process_group=own.get_group())
    dist.barrier()


def load_on_four_and_on_one(folder: str) -> None:
    """What two ranks saved, four read as their shards; and one reads into a plain layer."""
    expected = _layer(seed=4, bias=True).state_dict()
    four = expert_parallel(_layer(seed=5, bias=True), mesh(4)["expert"])
    state = four.state_dict()
    checkpoint.load(state, checkpoint_id=folder, process_group=mesh(4)["expert"].get_group())
    four.load_state_dict(state)
    for name, value in four.state_dict().items():
        torch.testing.assert_close(value.full_tensor() if isinstance(value, DTensor) else value, expected[name], rtol=0, atol=0)
    alone = _layer(seed=6, bias=True)
    state = alone.state_dict()
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    alone.load_state_dict(state)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def losses_of_training(dtype: str, steps: int) -> list[list[float]]:
    """[losses, gradient norms, rows] of a short training by 2 replicas of 2 expert-parallel ranks, and of one process.

    Without the load-balance loss, whose rows are counted over the ranks that share the experts.
    """
    sizes = {"hidden_size": 32, "intermediate_size": 16, "layers": 1, "heads": 2, "num_experts": 4, "experts_per_token": 2}
    config = TrainConfig(steps=steps, batch_size=8, context=16, routing="top_k", dtype=dtype, load_balance=0.0, **sizes)
    shares = Shares(Processes(mesh(2), device()), batch_size=config.batch_size, chunks=2)
    found = []
    for own in (shares, Alone()):
        experiment = Experiment(config, text.load(None, config.context), device=device(), shares=own)
        while not experiment.finished:
            experiment.advance()
        history = experiment.learners["top_k"].history
        found.append([history.loss, history.gradient_norm, history.rows])
    return found


def bench(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of ``sonicmoe bench`` on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.main(["bench", *arguments])
    return code, printed.getvalue()


def run_script(path: str, *arguments: str) -> str:
    """What a script prints on this rank, in the group that is there already."""
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(sys, "argv", [path, *arguments]),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def replay_repeats_a_pass() -> bool:
    """What a `Recorder` hands out again gives the same output and gradients, without the transport."""
    layer = expert_parallel(_layer(), mesh(4)["expert"], chunks=2)
    parallelism, x = layer.parallelism, torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
    recorder = measure.Recorder(parallelism.transport)
    layer.parallelism = ExpertParallelism(recorder, parallelism.chunks)
    results = []
    for replay in (False, True, True):
        recorder.restart(replay=replay)
        out = layer(x)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, layer.router.weight])])
        parallelism.transport.start = None  # a second journey would fail
    return all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


def refusal(option: str, value: object) -> str:
    """What `expert_parallel` says to an argument that cannot be."""
    own, layer, options = mesh(4)["expert"], _layer(), {}
    if option == "num_experts":
        layer = MoE(32, 16, value, 2)
    elif option == "mesh":
        own = mesh(2)
    elif option == "main_grads":
        layer = _layer(main_grads=value)
    elif option == "layer":
        layer = torch.nn.Linear(2, 2) if value == "linear" else expert_parallel(layer, own)
    else:
        options = {option: value} if option != "transport" or value != "symmetric_memory" else {option: value, "max_tokens": 8}
    try:
        expert_parallel(layer, own, **options)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def too_many_arrive() -> None:
    """Every rank is to receive 36 rows and has room for 8."""
    transport = PaddedOverGloo(mesh(4).get_group("expert"), 4, 1.0)
    transport.announce(torch.full((4, 1, 2), 9), num_tokens=4, slots_per_token=2, experts=2)


def last_rank_stalls(timeout_s: float, roll_call_s: float) -> None:
    """The last rank does not take part; its group has a short timeout."""
    failures.ROLL_CALL_S = roll_call_s
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    layer = expert_parallel(_layer(), DeviceMesh.from_group(group, "cpu"), src_data_rank=None)
    if dist.get_rank() < dist.get_world_size() - 1:
        layer(torch.randn(5, 32, dtype=torch.float64))


def last_rank_dies(roll_call_s: float) -> None:
    """The last rank leaves without a word while the others wait for its tokens."""
    failures.ROLL_CALL_S = roll_call_s
    layer = expert_parallel(_layer(), mesh(4)["expert"])
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(1)
    layer(torch.randn(5, 32, dtype=torch.float64))


def graph_replay_equals_eager(sizes: Thiek, options: dict) -> bool:
    """Forward in a CUDA graph, replayed with other tokens than it was captured with."""
    layer = expert_parallel(MoE(*sizes[1:], device=device(), dtype=torch.bfloat16), mesh(2)["expert"], **options)
    x, other = torch.randn(2, options["max_tokens"], sizes.H, device=device(), dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(other)
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(other)
        graph.replay()
    torch.cuda.synchronize()
    return torch.equal(out, expected)


def same_bits_again(sizes: Thiek, options: dict) -> bool:
    """Two passes, forward and backward, on the same tokens."""
    case = cases.make_case(sizes._replace(T=900), seed=1, device=device())
    layer = expert_parallel(case.layer(), mesh(2)["expert"], chunks=2, **options)
    first, second = (judging.run_layer(layer, case, mesh(2)["expert"], [500, 400])[0] for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)
