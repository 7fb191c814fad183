"""No cell of the matrix compiles a kernel on the GPU's time: what the layer may load is built before."""

from cute_runtime import prebuilt_variants
from testing.matrix.cells import LayerCell, load_matrix
from testing.matrix.kernels import DTYPES, cell_variants, expert_variants, matrix_variants
from testing.matrix.plan import experts_problem

MATRIX = load_matrix()
HOPPER = MATRIX.profiles["hopper"]


def test_every_layer_of_the_hopper_profile_finds_its_kernels():
    """At the sizes that cells run at, and with fewer or more rows as routing may leave."""
    built = {*prebuilt_variants(), *matrix_variants(MATRIX)}
    needed = set()
    for cell in MATRIX.cells:
        if not isinstance(cell, LayerCell) or cell.dtype not in DTYPES:
            continue
        needed |= {*cell_variants(cell, HOPPER)}
        sizes, _ = experts_problem(cell, HOPPER.limits)
        for rows in (sizes.rows // 2, sizes.rows + 128 * sizes.E):
            needed |= expert_variants(cell, sizes, rows)
    assert len(needed) > 100
    assert needed - built == set()


def test_what_is_prebuilt_is_not_listed_twice():
    listed = [variant.name for variant in matrix_variants(MATRIX)]
    assert len(set(listed)) == len(listed)
    assert not set(listed) & {variant.name for variant in prebuilt_variants()}
