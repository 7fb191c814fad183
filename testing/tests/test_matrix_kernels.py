"""No cell of the matrix compiles a kernel on the GPU's time: what the layer may load is built before."""

from cute_runtime import prebuilt_variants
from sonicmoe.kernels import variants
from sonicmoe.kernels.tiles import activation_backward_tile, down_tile, dx_tile, up_tile, weight_grad_tile
from testing.matrix.cells import LayerCell, load_matrix
from testing.matrix.kernels import matrix_variants
from testing.matrix.plan import experts_problem

MATRIX = load_matrix()


def test_every_layer_of_the_hopper_profile_finds_its_kernels():
    """The choices of hopper.py and hopper_backward.py, at the sizes that cells run at, and with fewer or more rows as routing may leave."""
    built = {variant.name for variant in (*prebuilt_variants(), *matrix_variants(MATRIX))}
    limits = MATRIX.profiles["hopper"].limits
    dtypes = {"bf16": "bfloat16", "fp16": "float16"}
    needed = set()
    for cell in MATRIX.cells:
        if not isinstance(cell, LayerCell) or cell.dtype not in dtypes:
            continue
        sizes, _ = experts_problem(cell, limits)
        common = {"dtype": dtypes[cell.dtype], "bias": cell.bias}
        gated = cell.activation in ("swiglu", "geglu", "reglu", "swiglu_oai")
        options = {"activation": cell.activation, "interleaved": gated and cell.layout == "interleaved"}
        for rows in {sizes.rows, sizes.rows // 2, sizes.rows + 128 * sizes.E}:
            down = down_tile(rows=rows, experts=sizes.E, reduced=sizes.I)
            for store_z in (True, False):
                up = up_tile(rows=rows, experts=sizes.E, store_z=store_z)
                needed.add(variants.up_projection(tile=up, **options, **common, store_z=store_z).name)
            needed.add(variants.down_projection(tile=down, **common).name)
            dtype = common["dtype"]
            back = activation_backward_tile(columns=sizes.I)
            needed.add(variants.activation_backward(tile=back, **options, dtype=dtype, dz=True, dscore=True, scaled_a=True).name)
            needed.add(variants.score_grad(**common).name)
            gradient = weight_grad_tile()
            needed |= {variants.weight_grad(tile=gradient, dtype=dtype, transposed=side).name for side in (True, False)}
            needed.add(variants.dx_rows(tile=dx_tile(rows=rows, experts=sizes.E), dtype=dtype).name)
            needed |= {variants.bias_grad(dtype=dtype, gathered=side).name for side in (True, False) if cell.bias}
    assert len(needed) > 30
    assert needed - built == set()


def test_what_is_prebuilt_is_not_listed_twice():
    listed = [variant.name for variant in matrix_variants(MATRIX)]
    assert len(set(listed)) == len(listed)
    assert not set(listed) & {variant.name for variant in prebuilt_variants()}
