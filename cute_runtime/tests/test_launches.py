"""Several launches as one call: order and arguments, what is refused before any of them, and errors on the way."""

import subprocess
import threading

import pytest
import torch

from cute_runtime import KernelCompileError, Variant, build, cli, launches, prebuilt_variants
from cute_runtime import sources as sources_module
from cute_runtime.emulator.native import native
from cute_runtime.launches import LAUNCHES, Given, Parts, one_call
from cute_runtime.sources import changed_sources, is_host_code, sources

F32, BF16, I32 = torch.float32, torch.bfloat16, torch.int32


class Function:
    """A function in a kernel's place, called from C; ``seen`` are the arguments of its calls, tensors as their values."""

    def __init__(self, body=lambda *args: None):
        self.body, self.seen = body, []
        self.native = native(self)

    def __call__(self, *args):
        self.seen.append(tuple(arg.clone() if torch.is_tensor(arg) else arg for arg in args))
        self.body(*args)


def scratch_of(*parts):
    scratch = Parts("scratch")
    for name, dtype, *shape in parts:
        scratch.add(name, dtype, *shape)
    return scratch


def test_functions_are_called_in_order_with_tensors_parts_and_numbers():
    add, scale = Function(lambda a, b, n, out: torch.add(a, b, alpha=n, out=out)), Function(lambda a, s, _, out: torch.mul(a, s, out=out))
    scratch = scratch_of(("pad", I32, 3), ("sum", F32, 4, 5))
    given = {"x": Given(F32, (4, 5)), "scratch": scratch.given(BF16), "out": Given(F32, (4, 5))}
    call = one_call(given, [scratch], [(add, ("x", "x", 3, "sum")), (scale, ("sum", 0.1, None, "out"))])
    x, out = torch.randn(4, 5), torch.full((4, 5), torch.nan)
    assert call(x, torch.empty(scratch.shape(BF16), dtype=BF16), out) is None
    assert torch.equal(out, (x + 3 * x) * 0.1)
    assert [len(function.seen) for function in (add, scale)] == [1, 1]
    assert torch.equal(scale.seen[0][0], x + 3 * x)
    assert scale.seen[0][1:3] == (0.1, None)
    assert add.seen[0][2] == 3


def test_parts_lie_apart_close_or_over_one_another():
    parts = scratch_of(("a", I32, 3), ("b", BF16, 5))
    parts.add("c", BF16, 1, apart=False)
    parts.add_over("d", "a", F32, 4)
    assert [(part.offset, part.bytes) for part in parts.parts.values()] == [(0, 12), (256, 10), (266, 2), (0, 16)]
    assert (parts.bytes, parts.shape(F32), parts.shape(BF16)) == (268, (67,), (134,))
    parts.add_over("e", "b", F32, 100)
    assert parts.bytes == 656


def ones(*shape, dtype=BF16):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("tensors", "number"),
    [
        ((ones(8, 4), ones(4, 1)), None),
        ((ones(8, 4, dtype=F32), ones(4, 1)), 0),
        ((ones(8, 5), ones(4, 1)), 0),
        ((ones(32), ones(4, 1)), 0),
        ((ones(4, 8).mT, ones(4, 1)), 0),
        ((ones(8, 8)[:, :4], ones(4, 1)), 0),
        ((ones(33)[1:].view(8, 4), ones(4, 1)), 0),
        ((ones(8, 4), ones(4, 2)[:, :1]), 1),
        ((ones(8, 4), ones(9)[1:5].view(4, 1)), None),
        ((ones(8, 4), ones(1, 4).mT), None),
        ((ones(8, 4), None), 1),
        ((ones(8, 4), 4), 1),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_numbered_before_any_call(tensors, number):
    """Eight by four at 16 bytes, four by one at two: a stride of one element says nothing."""
    function = Function()
    given = {"x": Given(BF16, (8, 4)), "y": Given(BF16, (4, 1), alignment=2)}
    assert one_call(given, [], [(function, ("x", "y"))])(*tensors) == number
    assert len(function.seen) == (number is None)


def test_what_there_is_none_of_is_none_to_the_functions_too():
    function = Function()
    call = one_call({"x": Given(F32, (2,)), "bias": None, "y": Given(F32, (2,))}, [], [(function, ("bias", "y", "x"))])
    x, y = torch.zeros(2), torch.ones(2)
    assert call(x, None, y) is None
    assert function.seen[0][0] is None
    assert [tensor.tolist() for tensor in function.seen[0][1:]] == [[1, 1], [0, 0]]
    assert [call(x, y, y), call(x, 1, y), call(x, None, None)] == [1, 1, 2]
    assert len(function.seen) == 1


def test_an_error_is_the_callers_and_ends_the_list():
    def fail(*args):
        raise KeyError("second")

    first, second, third = Function(), Function(fail), Function()
    call = one_call({"x": Given(F32, (2,))}, [], [(function, ("x",)) for function in (first, second, third)])
    for _ in range(2):
        with pytest.raises(KeyError, match="second"):
            call(torch.ones(2))
    assert [len(function.seen) for function in (first, second, third)] == [2, 2, 0]


def test_a_default_device_of_tensors_is_not_the_programs():
    function = Function()
    with torch.device("meta"):
        call = one_call({"x": Given(F32, (2,))}, [], [(function, ("x",))])
    call(torch.ones(2))
    assert len(function.seen) == 1


def test_functions_live_as_long_as_the_call():
    call = one_call({"x": Given(F32, (2,))}, [], [(Function(lambda x: x.add_(1)), ("x",))])
    x = torch.zeros(2)
    for _ in range(3):
        call(x)
    assert x.tolist() == [3, 3]


def test_threads_call_at_once():
    scratch = scratch_of(("twice", F32, 1000))
    calls = [(Function(lambda x, out: torch.mul(x, 2, out=out)), ("x", "twice")), (Function(lambda a, out: out.copy_(a)), ("twice", "out"))]
    call = one_call({"x": Given(F32, (1000,)), "scratch": scratch.given(F32), "out": Given(F32, (1000,))}, [scratch], calls)
    wrong = []

    def work(number):
        x, out = torch.full((1000,), float(number)), torch.empty(1000)
        for _ in range(50):
            call(x, torch.empty(scratch.shape(F32)), out)
            if not (out == 2 * number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ({f"x{i}": Given(F32, (1,)) for i in range(33)}, ("x0",), "too many tensors or arguments"),
        ({"x": Given(F32, (1,))}, ("x",) * 25, "too many tensors or arguments"),
    ],
)
def test_more_than_a_call_has_room_for_is_refused(given, arguments, message):
    with pytest.raises(ValueError, match=message):
        one_call(given, [], [(Function(), arguments)])


def test_what_is_no_function_and_names_used_twice_are_refused():
    with pytest.raises(ValueError, match="a function that is none"):
        one_call({"x": Given(F32, (1,))}, [], [(torch.ones(1), ("x",))])
    scratch = scratch_of(("x", F32, 1))
    with pytest.raises(ValueError, match=r"^launches: tensors x, scratch, x: must have names of their own$"):
        one_call({"x": Given(F32, (1,)), "scratch": scratch.given(F32)}, [scratch], [])
    call = one_call({"x": Given(F32, (1,))}, [], [])
    with pytest.raises(ValueError, match="another number of tensors"):
        call(torch.ones(1), torch.ones(1))


def test_it_is_built_beforehand_and_its_sources_are_the_c_file_and_the_compiler_call():
    assert prebuilt_variants(["cute_runtime"]) == [LAUNCHES]
    assert is_host_code(LAUNCHES.kernel)
    digests = sources(LAUNCHES)
    assert list(digests) == ["cute_runtime/host_code.py", "cute_runtime/kernels/launches.c"]
    assert changed_sources(digests | {"cute_runtime/kernels/launches.c": ""}) == ["cute_runtime/kernels/launches.c"]


def test_host_code_is_built_like_a_kernel_and_has_no_registers_to_inspect(tmp_path, capsys):
    path = build(LAUNCHES, tmp_path)
    assert build(LAUNCHES, tmp_path) == path
    symbols = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert symbols.split()[-1:] == ["__tvm_ffi_kernel"]
    assert cli.main(["inspect", "--variant", LAUNCHES.name, "--dir", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().out.strip() == "[]"


def test_host_code_that_does_not_compile_is_named(tmp_path, monkeypatch):
    kernels = tmp_path / "toy" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "broken.c").write_text('#error "no such thing"\n')
    monkeypatch.syspath_prepend(tmp_path)
    sources_module.package_folder.cache_clear()
    with pytest.raises(KernelCompileError, match=r"^toy.broken: does not compile \(.*no such thing.*\); the log is .*toy.broken.log$"):
        build(Variant("toy.kernels.broken"), tmp_path / "out")
    sources_module.package_folder.cache_clear()


def test_the_layout_of_a_scalar_and_a_matrix():
    assert launches._layout(BF16, ()) == [4, 16, 0]
    assert launches._layout(I32, (2, 3, 5)) == [0, 32, 3, 2, 3, 5, 15, 5, 1]
