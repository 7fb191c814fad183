"""A variant's name is its identity: reversible, safe as a file name, and refused where it would not be."""

import pickle

import pytest

from cute_runtime import Variant

KERNEL = "pkg.sub.kernels.gemm"


def test_name_lists_parameters_in_alphabetical_order():
    variant = Variant(KERNEL, {"tile_m": 128, "dtype": "bfloat16", "bias": True})
    assert variant.name == "pkg.sub.gemm-bias.true-dtype.bfloat16-tile_m.128"


def test_order_of_parameters_does_not_matter():
    assert Variant(KERNEL, {"a": 1, "b": 2}) == Variant(KERNEL, {"b": 2, "a": 1})
    assert len({Variant(KERNEL, {"a": 1, "b": 2}), Variant(KERNEL, {"b": 2, "a": 1})}) == 1


@pytest.mark.parametrize("params", [{}, {"k": 0}, {"flag": False, "n": 17, "word": "csr_2"}, {"a": 1, "b": True}])
def test_name_gives_the_variant_back(params):
    variant = Variant(KERNEL, params)
    again = Variant.from_name(variant.name)
    assert (again, again.kernel, dict(again.params)) == (variant, KERNEL, params)
    assert [type(value) for value in again.params.values()] == [type(variant.params[name]) for name in again.params]


def test_one_and_true_are_different_variants():
    assert Variant(KERNEL, {"a": 1}) != Variant(KERNEL, {"a": True})


def test_pickle_keeps_the_parameters():
    variant = pickle.loads(pickle.dumps(Variant(KERNEL, {"a": 1})))
    assert (variant.name, dict(variant.params)) == ("pkg.sub.gemm-a.1", {"a": 1})


def test_parameters_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        Variant(KERNEL, {"a": 1}).params["a"] = 2


@pytest.mark.parametrize("value", [-1, 1.5, "1x", "a-b", "a.b", "../x", "", "true", None])
def test_values_that_a_name_cannot_carry_are_refused(value):
    with pytest.raises(ValueError, match=r"params: a=.*: must be an identifier other than true and false, an integer from 0, or a bool"):
        Variant(KERNEL, {"a": value})


@pytest.mark.parametrize("kernel", ["gemm", "pkg.gemm", "pkg/kernels/gemm", "pkg.kernels.", "kernels.gemm"])
def test_modules_outside_a_kernels_folder_are_refused(kernel):
    with pytest.raises(ValueError, match=r"must be a module path <package>.kernels.<name>"):
        Variant(kernel)


@pytest.mark.parametrize("name", ["", "gemm", "pkg.gemm-b.1-a.1", "pkg.gemm-a", "pkg.gemm-a.01", "pkg.gemm-a.1/../x"])
def test_names_of_no_variant_are_refused(name):
    with pytest.raises(ValueError, match=r"must be"):
        Variant.from_name(name)
