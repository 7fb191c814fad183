"""The backward's kernels and those of weights stored the other way round, emulated: values against float64, tails, bits in every order.

What is emulated is compiled for sm_90a; the same compilation is read for registers and spills.
"""

import re

import pytest
import torch

import cute_runtime
from cute_runtime import emulator
from dispatch.chunk_counts import multiprocessors
from dispatch.kernels.sizes import TICKETS
from routing import Routing
from routing import hopper as routing_hopper
from sonicmoe import MoE, accuracy, backends, oracle, routed_experts
from sonicmoe.backends import hopper, hopper_backward
from sonicmoe.kernel_cases import (
    Case,
    check_activation_backward,
    check_added_weight_grads,
    check_dx_rows,
    check_up_projection,
    check_weight_grads,
    poison_new_tensors,
)
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import BROAD, LONE, PAIR, TALL, TILES, WIDE, Tile, weight_grad_tile
from sonicmoe.tests.stand_ins import CACHES

SIZES = (136, 72, 100, [5, 1, 0, 200, 64, 0, 130])
"""H, I, T and the experts' rows: none, one, a whole block of 64, tails; H and I end within a stage and a tile."""

SEEDS = (0, 1)
MULTIPROCESSORS = (4, 64)
"""By the seed: fewer clusters than tiles, so that some go by ticket, and more."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_new_tensors(monkeypatch)
    multiprocessors.cache_clear()
    yield
    multiprocessors.cache_clear()


ACTIVATION_BACKWARD = [
    (WIDE, {"layout": "concatenated", "activation": "geglu"}),
    (LONE, {"layout": "concatenated"}),
    (PAIR, {}),
    (PAIR, {"activation": "gelu"}),
]
"""Its tiles, with boxes of z for two parts and for one."""

RESET = r"st\.global\.b32\s+\[%rd\d+(\+\d+)?\], 0;"
"""Of the counter of tiles."""


def in_every_order(check):
    """The results of ``check()`` for each seed; they must have the same bits, NaN where nothing is written included."""
    results = []
    for seed, count in zip(SEEDS, MULTIPROCESSORS, strict=True):
        multiprocessors.cache_clear()
        with emulator.emulation(seed=seed, multiprocessors=count) as launches:
            results.append([tensor for tensor in check() if tensor is not None])
        assert launches
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def make_case(**options):
    return Case(*SIZES, dtype=torch.bfloat16, device="cpu", **options)


@pytest.mark.parametrize("overwrite_z", [False, True])
def test_activation_backward_matches_float64(overwrite_z):
    case = make_case(bias=True)
    in_every_order(lambda: check_activation_backward(case, hopper_backward.activation_backward, overwrite_z=overwrite_z))


@pytest.mark.parametrize(("tile", "options"), ACTIVATION_BACKWARD, ids=lambda value: getattr(value, "name", ""))
def test_activation_backward_matches_float64_in_each_tile(monkeypatch, tile, options):
    """Whole tiles, whose z comes by TMA, and tails, whose z comes row by row: dz where z was, and no row of a neighbour's z is read."""
    monkeypatch.setattr(hopper_backward, "activation_backward_tile", lambda **_: tile)
    case = make_case(**options)
    in_every_order(lambda: check_activation_backward(case, hopper_backward.activation_backward, overwrite_z=True))


def test_weight_and_bias_gradients_match_float64():
    case = make_case()
    in_every_order(lambda: check_weight_grads(case, hopper_backward.down_weight_grad, hopper_backward.up_weight_grad, bias=True))


@pytest.mark.parametrize("name", ["dw_down", "dw_up"])
def test_no_tile_of_a_weight_gradient_is_computed_twice(monkeypatch, name):
    """A counter that nobody resets ends at one ticket a cluster and one a tile begun: here a tile an expert, also without rows.

    Two blocks begin with four of the seven tiles, so that tickets decide on the rest.
    """
    case = make_case()
    monkeypatch.setattr(hopper_backward, "blocks", lambda device: 2)

    def gradient():
        if name == "dw_up":
            return hopper_backward.up_weight_grad(case.x, case.dz, case.plan, need_weight=True, need_bias=False)[0]
        return hopper_backward.down_weight_grad(case.dout, case.scaled_a, case.score, case.plan, need_weight=True, need_bias=False)[0]

    tile = weight_grad_tile()
    with emulator.emulation(edit=lambda ptx: re.sub(RESET, "", ptx)) as launches:
        assert not gradient().isnan().any()
    assert (case.H, case.width) <= (tile.m * tile.cluster, tile.n)
    clusters = launches[0].grid[0] // tile.cluster
    assert sorted(case.plan.tickets.tolist()) == [*[0] * (TICKETS - 1), clusters + len(case.counts)]
    with emulator.emulation():
        assert gradient().isnan().any()


def test_weight_gradients_of_experts_with_several_stages_match_float64():
    """Three consumers of 64 columns of A each, of which the last of the second tile has none and does not come to the tail's barrier."""
    case = Case(264, 72, 100, [450, 1, 390], dtype=torch.bfloat16, device="cpu")
    assert weight_grad_tile() is TALL
    with emulator.emulation() as launches:
        check_weight_grads(case, hopper_backward.down_weight_grad, hopper_backward.up_weight_grad, bias=False)
    assert {launch.block for launch in launches} == {(TALL.threads, 1, 1)}


def test_consumers_without_columns_may_be_tiles_ahead_at_the_tails_barrier(monkeypatch):
    """Tiles of 192, 192 and 64 columns, one or two stages each: two of three consumers leave every third tile at once."""
    monkeypatch.setattr(hopper_backward, "weight_grad_tile", lambda: TALL)
    monkeypatch.setattr(hopper_backward, "blocks", lambda device: 2)
    case = Case(448, 8, 50, [70, 5, 33, 1], dtype=torch.bfloat16, device="cpu")
    in_every_order(lambda: check_weight_grads(case, hopper_backward.down_weight_grad, hopper_backward.up_weight_grad, bias=False))


def test_experts_of_the_bias_gradients_lie_along_the_one_direction_of_a_grid_that_is_long():
    """The other two end at 65535 blocks."""
    case = make_case()
    with emulator.emulation() as launches:
        hopper_backward.up_weight_grad(None, case.dz, case.plan, need_weight=False, need_bias=True)
    assert [launch.grid for launch in launches] == [(len(case.counts), 1, 1)]


def test_weight_gradients_are_added_to_float32_buffers():
    case = make_case()
    with emulator.emulation():
        check_added_weight_grads(case, hopper_backward.down_weight_grad, hopper_backward.up_weight_grad)


def test_dx_rows_match_float64():
    case = make_case()
    in_every_order(lambda: [check_dx_rows(case, hopper_backward.dx_rows)])


def test_forward_takes_interleaved_weights_stored_with_their_last_dimensions_exchanged():
    """As transformers keeps gpt-oss's."""
    case = make_case(activation="swiglu_oai", transposed=True, bias=True)
    in_every_order(lambda: check_up_projection(case, hopper.up_projection))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_layer_at_once_has_the_bits_of_its_operations_one_by_one(monkeypatch, seed):
    """With parts of one allocation in place of tensors: nothing reads what is not written yet, or what another part has become."""
    for cache in CACHES:
        cache.cache_clear()
    monkeypatch.setattr(backends, "is_hopper", lambda device: True)
    monkeypatch.setattr(routing_hopper, "is_hopper", lambda device: True)
    torch.manual_seed(seed)
    layer, x = MoE(40, 24, 5, 2, bias=True, dtype=torch.bfloat16), torch.randn(70, 40).bfloat16().requires_grad_()

    def run():
        out = layer(x)
        return [out, *torch.autograd.grad((out.float() * out.detach().float().cos()).sum(), [x, *layer.parameters()])]

    with emulator.emulation(seed=seed) as launches:
        got = run()
        assert [len(launches), type(got[0].grad_fn).__name__] == [16, "_LayerBackward"]
        with torch.no_grad():
            inference = layer(x)
    with emulator.emulation(), backends.one_by_one():
        want = run()
    assert all(torch.equal(one, other) for one, other in zip([*got, inference], [*want, want[0]], strict=True))
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.parametrize("kept", [False, True], ids=["", "graph_kept"])
def test_experts_train_on_these_kernels(monkeypatch, kept):
    """The autograd function on the `hopper` backend, as on a GPU: every gradient against float64."""
    monkeypatch.setattr(backends, "resolve", lambda *_: "hopper")
    generator = torch.Generator().manual_seed(0)
    T, H, I, E, K = 70, 40, 24, 5, 2

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).bfloat16().requires_grad_()

    expert = torch.rand(T, E, generator=generator).argsort(1)[:, :K].flatten().int()
    expert[::11] = -1
    score = torch.rand(T * K, generator=generator).requires_grad_()
    token = torch.arange(T, dtype=torch.int32).repeat_interleave(K)
    routing = Routing(token, expert, score, T, E, K)
    leaves = {"dx": draw(T, H), "dw_up": draw(E, 2 * I, H, scale=H**-0.5), "dw_down": draw(E, H, I, scale=I**-0.5)}
    leaves |= {"db_up": draw(E, 2 * I), "db_down": draw(E, H), "dscore": score}
    x, w_up, w_down, b_up, b_down, _ = leaves.values()
    dout = draw(T, H).detach()
    want = oracle.experts(x, w_up, w_down, routing, dout, b_up=b_up, b_down=b_down)
    with emulator.emulation() as launches:
        out = routed_experts(x, w_up, w_down, routing, b_up=b_up, b_down=b_down)
        runs = [torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=kept) for _ in range(2 if kept else 1)]
    assert sum("weight_grad" in launch.kernel or "RowReduction" in launch.kernel for launch in launches) >= len(runs)
    for gradients in runs:
        assert all(torch.equal(one, other) for one, other in zip(gradients, runs[0], strict=True))
        got = {"o": out.detach(), **dict(zip(leaves, gradients, strict=True))}
        for name, error in {name: accuracy.measure(name, got[name], want[name]) for name in got if name != "dscore"}.items():
            assert error.whole < accuracy.THRESHOLDS[torch.bfloat16].whole, name
            assert error.worst_block < accuracy.THRESHOLDS[torch.bfloat16].worst_block, name
        assert (got["dscore"].double() - want["dscore"]).norm() < 8e-3 * want["dscore"].norm()


PRODUCTS = [
    *(
        variants.activation_backward(
            tile=tile, dtype="bfloat16", activation="swiglu", interleaved=True, dz=True, dscore=True, scaled_a=True
        )
        for tile in (WIDE, PAIR)
    ),
    variants.weight_grad(tile=WIDE, dtype="bfloat16", transposed=False),
    variants.weight_grad(tile=WIDE, dtype="bfloat16", transposed=True),
    variants.weight_grad(tile=WIDE, dtype="bfloat16", transposed=True, add=True),
    variants.weight_grad(tile=PAIR, dtype="bfloat16", transposed=False),
    variants.weight_grad(tile=PAIR, dtype="bfloat16", transposed=True),
    variants.dx_rows(tile=TALL, dtype="bfloat16"),
    variants.up_projection(
        tile=TALL, dtype="bfloat16", activation="swiglu_oai", interleaved=True, store_z=True, bias=True, transposed=True
    ),
]
"""Of what the tests above emulate, the kernels with products."""


@pytest.mark.parametrize("variant", PRODUCTS, ids=lambda variant: variant.name)
def test_products_run_on_wgmma_without_local_memory_and_registers_fit_a_block(variant):
    (function,) = cute_runtime.read_resources(emulator.compiled(variant).object)
    assert not function.uses_local_memory
    assert function.hgmma >= 4
    assert function.registers * TILES[variant.params["tile"]].threads <= 65536


@pytest.mark.parametrize(
    "variant",
    [variants.score_grad(dtype="bfloat16", bias=True), variants.bias_grad(dtype="bfloat16", gathered=True)],
    ids=lambda variant: variant.name,
)
def test_sums_use_no_local_memory(variant):
    (function,) = cute_runtime.read_resources(emulator.compiled(variant).object)
    assert not function.uses_local_memory


def test_a_reduction_over_rows_takes_no_ping_pong():
    row_reduction = pytest.importorskip("sonicmoe.kernels.row_reduction", reason="the compiler is not installed")
    with pytest.raises(ValueError, match=f"^{BROAD.name}: a reduction over rows .* takes no ping-pong"):
        row_reduction.RowReduction(tile=BROAD, dtype=None, epilogue=None, ticket=0)


def test_an_input_through_the_stages_takes_no_ping_pong_and_64_rows_a_consumer():
    fed_gemm = pytest.importorskip("sonicmoe.kernels.fed_gemm", reason="the compiler is not installed")
    for tile in (BROAD, Tile(m=256, n=128)):
        with pytest.raises(ValueError, match=f"^{tile.name}: an input through the stages needs .* 64 rows each"):
            fed_gemm.FedGemm(tile=tile, dtype=None, epilogue=None, ticket=0, transposed_b=True)
