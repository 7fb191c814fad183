"""The matrix file: what cannot be is refused with file, line and cell; what is there is what the issue asks for."""

from pathlib import Path

import pytest

from testing.matrix.cells import TENSORS, CountCell, MatrixError, load_matrix
from testing.tests import small_matrix

ONE = "- {name: one, thiek: [1024, 768, 256, 8, 2]}"


def line_of(text: str) -> int:
    return small_matrix.TEXT[: small_matrix.TEXT.index(text)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (ONE, "- {name: one, thiek: [1024, 768, 256, 8, 9]}", "cell layer/one: K=9 must be from 1 to E=8"),
        (ONE, "- {name: one, thiek: [1024, 770, 256, 8, 2]}", "cell layer/one: H=770 must be a positive multiple of 8"),
        (ONE, "- {name: one, thiek: [1024, 768, 250, 8, 2]}", "cell layer/one: I=250 must be a positive multiple of 8"),
        (ONE, "- {name: one, thiek: [1024, 768, 256, 8]}", "cell layer/one: thiek [1024, 768, 256, 8] must be the five numbers"),
        (ONE, "- {name: one, thiek: [1073741824, 768, 256, 8, 2]}", "cell layer/one: T*K=2147483648 and E=8 must be below 2**31"),
        (ONE, "- {name: one, thiek: [-1, 768, 256, 8, 2]}", "cell layer/one: thiek must be a list of whole numbers of at least 0"),
        (ONE, ONE.replace("}", ", routing: best}"), "cell layer/one: routing 'best' is not one of softmax, grouped, nearest"),
        (ONE, ONE.replace("}", ", activation: tanh}"), "cell layer/one: activation 'tanh' is not one of swiglu"),
        (ONE, ONE.replace("}", ", dtype: fp16}"), "cell layer/one: dtype fp16 has no thresholds"),
        (ONE, ONE.replace("}", ", gate: 1}"), "cell layer/one: unknown key 'gate'"),
        (ONE, ONE.replace("}", ", bias: 1}"), "cell layer/one: bias 1 must be true or false"),
        (ONE, ONE.replace("}", ", counts: [1, 1]}"), "cell layer/one: counts needs K=1"),
        (ONE, "- {name: one, thiek: [4, 768, 256, 2, 1], counts: [1, 2]}", "counts has 2 numbers with sum 3; it must be E=2 numbers"),
        (ONE, "- {name: one, thiek: [8, 768, 256, 6, 2], routing: grouped}", "E=6 must be a multiple of the 4 groups of routing grouped"),
        (ONE, "- {name: one, thiek: [8, 768, 256, 8, 5], routing: grouped}", "K=5 must not exceed the 4 experts that routing grouped"),
        (ONE, ONE.replace("}", ", routing: [softmax]}"), "cell layer/one: routing ['softmax'] is not one of softmax, grouped"),
        (ONE, ONE.replace("one", "1"), "group layer: name 1 must be a text"),
        (ONE, ONE.replace("name", "[name]"), "a key must be a word"),
        ("group: layer", "group: [layer]", "a group of layers: group ['layer'] must be a text"),
        ("common: {routing: softmax}", "common: softmax", "group layer: common must be a mapping of what its cells share"),
        ("- {name: two,", "- {name: one,", "cell layer/one: the name was already given on line 31"),
        ("experts: 4, lengths", "experts: 0, lengths", "cell count/e4: experts 0 must be a whole number of at least 1"),
        ("modes: [forward]", "modes: [sideways]", "cell speed/fast: mode 'sideways' is not one of inference"),
        ("nearest, tile_m: 128", "nearest", "routing nearest: tile_m is missing; token_rounding needs it"),
        ("scoring: softmax}", "scoring: softmax, tile_m: 8}", "routing softmax: tile_m is for token_rounding only"),
        ("dx: {whole: 1.0e-2, worst", "dx: {whole: 9.0e-2, worst", "accuracy bf16 dx: worst_block must not be tighter than whole"),
        ("{routed_rows: null", "{routed_rows: 0", "profile hopper limits: routed_rows 0 must be"),
    ],
)  # fmt: skip
def test_a_cell_that_cannot_be_is_refused_with_its_line(tmp_path: Path, old: str, new: str, problem: str):
    path = small_matrix.write(tmp_path, (old, new))
    with pytest.raises(MatrixError) as error:
        load_matrix(path)
    message = str(error.value)
    assert problem in message
    assert message.startswith(f"{path}:{line_of(old)}: ")
    assert "\n" not in message


def test_duplicate_key_names_both_lines(tmp_path: Path):
    path = small_matrix.write(tmp_path, ("  softmax: {method", "  nearest: {method"))
    with pytest.raises(MatrixError, match=rf"{path}:{line_of('  nearest: ')}: the key 'nearest' was already given on line"):
        load_matrix(path)


def test_missing_section_and_unreadable_files_are_one_sentence(tmp_path: Path):
    (tmp_path / "half.yaml").write_text("accuracy: {}\n")
    (tmp_path / "broken.yaml").write_text("layers: [\n")
    (tmp_path / "empty.yaml").write_text("")
    for name, problem in (("half", "is missing"), ("broken", "is not YAML"), ("empty", "is empty"), ("none", "No such file")):
        with pytest.raises(MatrixError, match=problem):
            load_matrix(tmp_path / f"{name}.yaml")


def test_a_group_shares_its_common_keys_and_a_cell_overrides_them(tmp_path: Path):
    path = small_matrix.write(tmp_path, (ONE, ONE.replace("}", ", routing: nearest}")))
    one, two = load_matrix(path).cells_of("layer")
    assert (one.routing.name, two.routing.name) == ("nearest", "softmax")


def test_the_grid_holds_what_was_promised():
    matrix = load_matrix()
    layers = {cell.name: cell for cell in matrix.cells_of("layer")}
    classic = {cell.thiek for cell in layers.values() if cell.name.startswith("classic/")}
    assert classic == {
        (8192, 768, 256, 128, 8), (8192, 768, 512, 64, 4), (8192, 768, 1024, 32, 2),
        (8192, 1536, 256, 128, 8), (8192, 1536, 512, 64, 4), (8192, 1536, 1024, 32, 2),
        (8192, 4096, 256, 256, 16), (8192, 4096, 512, 128, 8), (8192, 4096, 1024, 64, 4),
        (8192, 4096, 512, 256, 16), (8192, 4096, 1024, 128, 8), (8192, 4096, 2048, 64, 4),
    }  # fmt: skip
    assert layers["models/deepseek-v3"].thiek == (8192, 7168, 2048, 256, 8)
    assert {cell.thiek.E for cell in layers.values()} >= {8, 512}
    assert {cell.thiek.H for cell in layers.values()} >= {768, 7168}
    assert {cell.thiek.K for cell in layers.values()} >= {1, 16}
    assert {cell.dtype for cell in layers.values()} == {"bf16", "fp16", "fp32"}
    assert {cell.routing.mode for cell in layers.values()} >= {"nearest", "up", "down", "stochastic", "balanced"}
    assert any(cell.sentinels for cell in layers.values())
    assert any(cell.thiek.T == 0 for cell in layers.values())
    counts: list[CountCell] = matrix.cells_of("count_cumsum")
    assert {cell.experts for cell in counts} >= {4, 50_000}
    assert all(2_097_152 in cell.lengths and cell.random_lengths == 50 for cell in counts)
    assert all(set(thresholds) == set(TENSORS) for thresholds in matrix.thresholds.values())
