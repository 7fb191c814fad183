"""Custom operators, which torch.compile puts into its graph as they are instead of tracing their bodies."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import cute_runtime
from cute_runtime import BACKENDS

_PLAIN = {Tensor, Parameter, torch.dtype, type(None), bool, int, float, str, list, tuple}
"""Types of arguments that no one but us handles: a subclass of Tensor may handle operators in a way of its own."""

_NOTHING = contextlib.nullcontext()
_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def operator(name: str, changes: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Turn a function with type hints into a call of the operator ``name`` ("namespace::operator"), which then stands in its place.

    The body runs on every device, below autograd, and must neither change an argument, but those that ``changes`` names, nor return
    one, nor return two views of one memory. :func:`fake` adds what it returns for tensors without data, :func:`differentiable` a
    gradient; the operator itself is the function's attribute ``op``.

    In eager mode, where nothing looks at operators, the function calls its body itself: PyTorch's dispatcher takes longer for a body
    in Python than a launch does. Tracing, dispatch modes, functorch's transforms and subclasses of tensors get the operator.

    torch.library.custom_op does the same as the rest, but the first call of its operators imports torch.compile (3 s on one core).
    """

    def register(body: Callable) -> Callable:
        namespace, _, base = name.partition("::")
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(base + torch.library.infer_schema(body, mutates_args=changes), tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(base, body, "CompositeExplicitAutograd")
        _libraries.append(library)
        op = getattr(getattr(torch.ops, namespace), base).default

        @functools.wraps(body)
        def call(*args: Any, **options: Any) -> Any:
            if not is_direct(args):
                return op(*args, **options)
            if torch.is_grad_enabled() and needs_gradient(args):
                return (call.gradient or op)(*args, **options)
            return body(*args, **options)

        call.op = op
        call.gradient = None
        call.without_data = functools.partial(library.impl, base, dispatch_key="Meta")
        return call

    return register


def fake(call: Callable) -> Callable[[Callable], Callable]:
    """Decorator: the function says what an operator returns for tensors without data, made by their ``new_empty``.

    torch.library.register_fake does more, and looks for its caller's source for 3 ms each time: a third of the time of the first call.
    """

    def register(function: Callable) -> Callable:
        call.without_data(function)
        return function

    return register


def differentiable(call: Callable, backward: Callable, setup_context: Callable) -> None:
    """Give an operator a gradient. torch.library.register_autograd alone would cost every eager call 20 microseconds.

    Such an operator is called with all its arguments, by position.
    """

    body = call.__wrapped__

    # With setup_context as a method of its own, PyTorch would bind the arguments to forward's signature at every call, 20 microseconds.
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = body(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    call.gradient = apply_of(type(call.__name__, (torch.autograd.Function,), members))
    torch.library.register_autograd(call.op, backward, setup_context=setup_context)


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """The function's ``apply`` where `is_direct` holds and it has no setup_context of its own: without what PyTorch does in Python first,
    for functorch and for arguments by name, which takes twice as long as all the rest."""
    return super(torch.autograd.Function, function).apply


def not_differentiable(call: Callable, name: str) -> None:
    """Refuse to differentiate an operator that computes the gradient of ``name``: it would pass for a constant otherwise."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(f"{name}: second derivatives (create_graph=True, double backward) are not available")

    torch.library.register_autograd(call.op, refuse)


def is_direct(args: tuple) -> bool:
    """Whether the body is all there is to an operator on these arguments, of which the first is a tensor.

    It is not where someone traces, where a mode or a subclass of tensors comes in between, and for tensors without data.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and _PLAIN.issuperset(map(type, args))
        and not args[0].is_meta
    )


def needs_gradient(args: tuple) -> bool:
    """Whether a tensor among the arguments requires a gradient."""
    for arg in args:  # noqa: SIM110 - half the time of any()
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast on the device; free where there is none, for torch.autocast takes 5 microseconds.

    PyTorch does not know autocast for tensors without data (meta): even asking whether it is on is an error there.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else _NOTHING


def is_hopper(device: torch.device) -> bool:
    """Whether the device runs the kernels, an sm_90 GPU, in eager mode and in code that torch.compile traces."""
    if device.type != "cuda":
        return False
    if torch.compiler.is_compiling():
        # The one query of a device whose result torch.compile takes for a constant.
        properties = torch.cuda.get_device_properties(device)
        return (properties.major, properties.minor) == (9, 0)
    return cute_runtime.is_supported_device(device)


def check_backend(backend: str) -> None:
    """Refuse a backend that no operator has."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
