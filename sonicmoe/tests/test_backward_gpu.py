"""The backward's kernels on an sm_90 GPU: values against float64 element by element, tails, bits."""

import itertools

import pytest
import torch

from sonicmoe.backends import hopper_backward
from sonicmoe.kernel_cases import (
    Case,
    check_activation_backward,
    check_added_weight_grads,
    check_dx_rows,
    check_weight_grads,
    poison_new_tensors,
)
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import LONE, PAIR, TALL, WIDE
from sonicmoe.tests.kernel_options import kernel_options

pytestmark = pytest.mark.gpu

COUNTS = {
    "one full tile": (192, 256, 192, [128]),
    "empty, one row, tails": (136, 72, 100, [5, 0, 130, 64, 1, 300, 128, 0]),
    "all rows in one expert": (512, 264, 700, [0, 1000, 0]),
    "smallest sizes": (8, 8, 9, [3, 0, 9]),
    "more experts than lanes": (200, 328, 333, [(7 * e) % 200 for e in range(70)]),
    "more tiles than blocks": (1024, 520, 900, [700, 60, 900]),
    "no row": (64, 64, 4, [0, 0]),
}
"""H, I, T and the experts' rows."""

VARIANTS = [
    ("swiglu", "interleaved", False, torch.bfloat16),
    ("swiglu", "concatenated", True, torch.bfloat16),
    ("geglu", "interleaved", True, torch.float16),
    ("swiglu_oai", "interleaved", True, torch.bfloat16),
    ("reglu", "concatenated", False, torch.float16),
    ("gelu", "interleaved", False, torch.bfloat16),
    ("relu_squared", "interleaved", True, torch.bfloat16),
]
"""activation, layout, bias and dtype of activation_backward."""

TILES = {tile.name: tile for tile in (WIDE, LONE, PAIR, TALL)}
"""Of activation_backward."""
TILE_VARIANTS = [
    ("swiglu", "interleaved", torch.bfloat16),
    ("geglu", "concatenated", torch.float16),
    ("gelu", "interleaved", torch.bfloat16),
]

LAYOUTS = ["interleaved", "concatenated"]
DTYPES = [torch.bfloat16, torch.float16]
NEEDS = ["need_dz", "need_dscore", "need_scaled_a"]
WEIGHT_GRADS = [("swiglu", True, torch.bfloat16), ("relu", False, torch.float16)]
ADDED = [("swiglu", torch.bfloat16), ("relu", torch.float16)]


def gpu_kernels():
    """What these tests load, for `build_defs.gpu_kernels`."""
    layers = [kernel_options(*variant) for variant in VARIANTS]
    layers += [kernel_options(layout=layout) for layout in LAYOUTS]
    layers += [kernel_options(activation, bias=bias, dtype=dtype) for activation, bias, dtype in WEIGHT_GRADS]
    layers += [kernel_options(dtype=dtype) for dtype in DTYPES]
    layers += [kernel_options(dtype=dtype) | {"transposed": True} for dtype in DTYPES]
    layers += [kernel_options() | {"results": (need.removeprefix("need_"),)} for need in NEEDS if need != "need_scaled_a"]
    found = [variants.backward_variants(**layer) for layer in layers]
    found += [variants.weight_grads(dtype=kernel_options(dtype=dtype)["dtype"], add=True) for _, dtype in ADDED]
    found += [_tile_variants(tile, *variant) for tile in TILES.values() for variant in TILE_VARIANTS]
    return list(itertools.chain.from_iterable(found))


def _tile_variants(tile, activation, layout, dtype):
    options = {name: value for name, value in kernel_options(activation, layout, False, dtype).items() if name != "bias"}
    return [variants.activation_backward(tile=tile, **options, dz=True, dscore=True, scaled_a=True)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_new_tensors(monkeypatch)


def assert_same_bits(first, second, rows):
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one[:rows], other[:rows])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("activation", "layout", "bias", "dtype"), VARIANTS)
def test_activation_backward_matches_float64(counts, activation, layout, bias, dtype):
    case = Case(*COUNTS[counts], dtype=dtype, activation=activation, layout=layout, bias=bias)
    first, second = (check_activation_backward(case, hopper_backward.activation_backward) for _ in range(2))
    assert_same_bits(first[::2], second[::2], case.rows)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("activation", "layout", "dtype"), TILE_VARIANTS)
@pytest.mark.parametrize("tile", TILES)
def test_activation_backward_matches_float64_in_each_tile(monkeypatch, counts, activation, layout, dtype, tile):
    """In the memory of z too: no row of a neighbour's z is read, which may be dz already."""
    monkeypatch.setattr(hopper_backward, "activation_backward_tile", lambda **_: TILES[tile])
    case = Case(*COUNTS[counts], dtype=dtype, activation=activation, layout=layout)
    apart, over = (check_activation_backward(case, hopper_backward.activation_backward, overwrite_z=over) for over in (False, True))
    assert_same_bits(apart[::2], over[::2], case.rows)
    assert torch.equal(apart[1], over[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dz_may_take_the_memory_of_z(layout):
    case = Case(136, 328, 100, [5, 0, 130, 64, 1, 300, 128, 0], dtype=torch.bfloat16, layout=layout)
    apart, over = (check_activation_backward(case, hopper_backward.activation_backward, overwrite_z=over) for over in (False, True))
    assert_same_bits(apart[::2], over[::2], case.rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_may_be_stored_with_their_last_dimensions_exchanged(dtype):
    case = Case(136, 72, 100, [5, 0, 130, 64, 1, 300, 128, 0], dtype=dtype, transposed=True)
    check_activation_backward(case, hopper_backward.activation_backward)
    check_dx_rows(case, hopper_backward.dx_rows)


@pytest.mark.parametrize("needs", NEEDS)
def test_what_is_not_needed_is_not_made(needs):
    case = Case(136, 72, 100, [5, 0, 130, 64], dtype=torch.bfloat16)
    alone = {name: name == needs for name in NEEDS}
    if needs != "need_scaled_a":
        check_activation_backward(case, hopper_backward.activation_backward, **alone)
    else:
        dz, dscore, scaled_a = hopper_backward.activation_backward(
            case.dout, case.z, None, None, case.score, case.plan, activation="swiglu", gate_up_layout="interleaved", **alone
        )
        want = check_activation_backward(case, hopper_backward.activation_backward)[2]
        assert dz is dscore is None
        torch.testing.assert_close(scaled_a[: case.rows], want[: case.rows], rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("activation", "bias", "dtype"), WEIGHT_GRADS)
def test_weight_gradients_match_float64(counts, activation, bias, dtype):
    case = Case(*COUNTS[counts], dtype=dtype, activation=activation)
    operations = hopper_backward.down_weight_grad, hopper_backward.up_weight_grad
    first, second = (check_weight_grads(case, *operations, bias=bias) for _ in range(2))
    assert_same_bits(first, second, None)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("activation", "dtype"), ADDED)
def test_weight_gradients_are_added_to_float32_buffers(counts, activation, dtype):
    case = Case(*COUNTS[counts], dtype=dtype, activation=activation)
    check_added_weight_grads(case, hopper_backward.down_weight_grad, hopper_backward.up_weight_grad)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_rows_match_float64(counts, dtype):
    case = Case(*COUNTS[counts], dtype=dtype)
    first, second = (check_dx_rows(case, hopper_backward.dx_rows) for _ in range(2))
    assert torch.equal(first[: case.rows], second[: case.rows])
