"""Times decoder layers of transformers' models with each experts implementation: ``python -m testing.transformers_layers``.

A model of one decoder layer in its published sizes, with random weights and normally distributed inputs, runs with transformers' own
implementations (eager, batched_mm, grouped_mm) and with this library's, in turns in one process; and so do its experts alone, on
what the router gave them. Outputs and gradients are compared with eager's first. The result goes to testing/results/, from where
`testing.readme_tables` takes docs/transformers.md's table. Needs the extra ``transformers``, which is imported when a layer is built.
Notation: T tokens, H hidden size, I intermediate size, E experts, K experts per token.
"""

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sonicmoe import benchmark, devices, environment, timing
from sonicmoe.cases import DTYPES
from testing.matrix.report import machine_text
from testing.matrix.results import write_atomically

RESULTS = Path(__file__).absolute().parent / "results"
OURS = "sonicmoe_experts"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", OURS)
SCOPES = ("layer", "experts")
ROTATED = 8
"""Inputs of decode, one after the other."""
LARGEST_DIFFERENCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-4, "fp64": 1e-10}
"""Relative Frobenius difference from eager up to which an implementation computes the same: several roundings of each.

Gradients may differ by twice that, for they are rounded once more often.
"""


class Sizes(NamedTuple):
    """A published layer."""

    model_type: str
    H: int
    I: int
    E: int
    K: int
    config: dict[str, Any]
    """What else the layer's config says."""


MODELS = {
    "Mixtral-8x7B": Sizes("mixtral", 4096, 14336, 8, 2, {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None}),
    "Qwen3-30B-A3B": Sizes(
        *("qwen3_moe", 2048, 768, 128, 8),
        {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True},
    ),
    "gpt-oss-20b": Sizes(
        *("gpt_oss", 2880, 2880, 32, 4),
        {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "layer_types": ["full_attention"]},
    ),
}
TINY = {"H": 64, "I": 32, "E": 8, "K": 2}
TINY_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class Step(NamedTuple):
    """What a layer is asked for: sequences of a length, each new token attending to its sequence."""

    sequences: int
    length: int
    training: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


STEPS = {
    "prefill": Step(8, 1024),
    "decode 1": Step(1, 1),
    "decode 8": Step(8, 1),
    "decode 64": Step(64, 1),
    "training": Step(8, 1024, training=True),
}
"""Decode has no past to attend to: it would cost every implementation the same. Training is forward and backward."""


@dataclass(frozen=True)
class Layer:
    """A model of one decoder layer, and its experts."""

    name: str
    sizes: Sizes
    model: torch.nn.Module
    dtype: str
    device: torch.device

    @property
    def experts(self) -> torch.nn.Module:
        return self.model.layers[0].mlp.experts

    def use(self, implementation: str) -> None:
        self.experts.config._experts_implementation = implementation


def build(name: str, *, dtype: str, device: torch.device, tiny: bool = False) -> Layer:
    """Random weights with a standard deviation of H^-1/2, so that activations stay of order one."""
    from transformers import AutoConfig, AutoModel

    import sonicmoe.integrations.transformers  # registers our implementation  # noqa: F401

    sizes = MODELS[name]._replace(**TINY) if tiny else MODELS[name]
    expert_names = {"qwen3_moe": ("num_experts", "moe_intermediate_size")}
    experts, intermediate = expert_names.get(sizes.model_type, ("num_local_experts", "intermediate_size"))
    config = AutoConfig.for_model(
        sizes.model_type,
        num_hidden_layers=1,
        vocab_size=128,
        hidden_size=sizes.H,
        num_experts_per_tok=sizes.K,
        initializer_range=sizes.H**-0.5,
        **{experts: sizes.E, intermediate: sizes.I},
        **sizes.config | (TINY_ATTENTION if tiny else {}),
    )
    torch.manual_seed(0)
    with device:
        # gpt-oss's attention sinks are not in torch's scaled_dot_product_attention.
        attention = "eager" if sizes.model_type == "gpt_oss" else "sdpa"
        model = AutoModel.from_config(config, attn_implementation=attention, dtype=DTYPES[dtype])
    return Layer(name, sizes, model, dtype, device)


def measure(layer: Layer, step_name: str, step: Step, implementations: Sequence[str], **effort: float) -> list[dict[str, Any]]:
    """A cell for every implementation and scope.

    Args:
        effort: of `timing.measure`.
    """
    layer.model.train(step.training)
    calls = dict(zip(SCOPES, _calls(layer, step), strict=True))
    expected = {scope: _results(layer, "eager", call, training=step.training) for scope, call in calls.items()}
    variants, cells = {}, []
    for implementation in implementations:
        for scope, call in calls.items():
            cell = _describe(layer, step_name, step, implementation, scope)
            cells.append(cell)
            cell["why"] = _why_not(layer, step, implementation) or _compare(layer, implementation, call, expected[scope], cell)
            cell["passed"] = not cell["why"]
            if cell["passed"]:
                variants[cell["name"]] = _variant(layer, implementation, call, training=step.training)
    times = timing.measure(variants, device=layer.device, **effort) if variants else {}
    _, H, I, *_ = layer.sizes
    flops = timing.model_flops(step.tokens * layer.sizes.K, H, I, gated=True)
    for cell in cells:
        if cell["name"] in times:
            cell |= times[cell["name"]]._asdict()
            if cell["scope"] == "experts":
                cell["tflops"] = timing.tflops(flops[cell["mode"]], cell["ms"])
    return cells


class Call(NamedTuple):
    """What is timed, on one of several inputs: decode in a loop on one would find its experts' weights in the L2 cache."""

    runs: list[Callable[[], torch.Tensor]]
    leaves: list[torch.Tensor]
    """What a training step differentiates; it has one input."""
    compared: list[int]
    """Those of the leaves whose gradients must agree with eager's."""
    dout: torch.Tensor


def _calls(layer: Layer, step: Step) -> tuple[Call, Call]:
    """The whole layer's, and its experts' on what its router gives them."""
    generator = torch.Generator(layer.device).manual_seed(1)

    def draw() -> torch.Tensor:
        shape = (step.sequences, step.length, layer.sizes.H)
        return torch.randn(shape, generator=generator, device=layer.device, dtype=DTYPES[layer.dtype])

    inputs, dout = [draw() for _ in range(1 if step.length > 1 else ROTATED)], draw()
    given: list[list[torch.Tensor]] = []
    hook = layer.experts.register_forward_pre_hook(lambda module, rows: given.append([tensor.detach() for tensor in rows]))
    layer.use("eager")
    with hook, torch.no_grad():
        for x in inputs:
            layer.model(inputs_embeds=x, use_cache=False)
    differentiated = [inputs[0], given[0][0], given[0][2]]
    if step.training:
        for tensor in differentiated:
            tensor.requires_grad_()
    layers = [lambda x=x: layer.model(inputs_embeds=x, use_cache=False).last_hidden_state for x in inputs]
    experts = [lambda rows=rows: layer.experts(*rows) for rows in given]
    parameters = list(layer.experts.parameters())
    # The embedding is not looked up. Gradients of a layer's other parameters may be small sums of large terms.
    others = [parameter for name, parameter in layer.model.named_parameters() if "embed_tokens" not in name and ".experts." not in name]
    return (
        Call(layers, [inputs[0], *parameters, *others], list(range(1 + len(parameters))), dout),
        Call(experts, [*differentiated[1:], *parameters], list(range(2 + len(parameters))), dout.flatten(0, 1)),
    )


def _describe(layer: Layer, step_name: str, step: Step, implementation: str, scope: str) -> dict[str, Any]:
    return {
        "name": f"{layer.name}/{step_name}/{implementation}/{scope}",
        "thiek": [step.tokens, *layer.sizes[1:5]],
        "routing": "top_k",
        "dtype": layer.dtype,
        "mode": "forward+backward" if step.training else "inference",
        "model": layer.name,
        "step": step_name,
        "implementation": implementation,
        "scope": scope,
    }


def _why_not(layer: Layer, step: Step, implementation: str) -> str:
    """batched_mm copies an expert's weights for each of its rows, and as many gradients."""
    if implementation != "batched_mm":
        return ""
    rows = step.tokens * layer.sizes.K
    needed = rows * 3 * layer.sizes.H * layer.sizes.I * DTYPES[layer.dtype].itemsize * (2 if step.training else 1)
    if needed <= 0.9 * benchmark.available_memory(layer.device):
        return ""
    return f"needs {needed / 2**30:.0f} GiB for {rows} copies of experts"


def _compare(layer: Layer, implementation: str, call: Call, expected: list[torch.Tensor], cell: dict[str, Any]) -> str:
    """Why an implementation may not be timed, or nothing; its largest difference from eager goes into the cell."""
    try:
        got = _results(layer, implementation, call, training=len(expected) > 1)
    except (ValueError, TypeError, RuntimeError) as error:  # refused, or out of memory
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    output, *gradients = (_difference(own, other) for own, other in zip(got, expected, strict=True))
    cell["difference_from_eager"] = max(output, *gradients, 0.0)
    limit = LARGEST_DIFFERENCE[layer.dtype]
    for what, found, most in (("output", output, limit), ("a gradient", max(gradients, default=0.0), 2 * limit)):
        if not found <= most:
            return f"{what} differs by {found:.1e} from eager's, must be at most {most:.0e}"
    return ""


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(got.double() - expected.double()) / torch.linalg.vector_norm(expected.double())).item()


def _results(layer: Layer, implementation: str, call: Call, *, training: bool) -> list[torch.Tensor]:
    """The output and, in training, the gradients to compare."""
    layer.use(implementation)
    if not training:
        with torch.no_grad():
            return [call.runs[0]()]
    out = call.runs[0]()
    gradients = torch.autograd.grad(out, call.leaves, call.dout)
    return [out.detach(), *(gradients[place] for place in call.compared)]


def _variant(layer: Layer, implementation: str, call: Call, *, training: bool) -> timing.Variant:
    inputs = itertools.cycle(call.runs)

    def prepare() -> Callable[[], torch.Tensor]:
        layer.use(implementation)
        return next(inputs)

    def run(forward: Callable[[], torch.Tensor]) -> None:
        if training:
            torch.autograd.grad(forward(), call.leaves, call.dout)
        else:
            with torch.no_grad():
                forward()

    return timing.Variant(run, prepare)


def select(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a recorded result that the table shows."""
    return [] if result.get("tiny") else [cell for cell in result["cells"] if cell.get("implementation") in IMPLEMENTATIONS]


def table(result: dict[str, Any]) -> str:
    """Markdown: a row for each model and step; each time is the layer's / its experts' alone."""
    cells = {(cell["model"], cell["step"], cell["implementation"], cell["scope"]): cell for cell in select(result)}
    lines = [machine_text(result) + ":", ""]
    lines.append(f"| model | step | T | {' | '.join(IMPLEMENTATIONS[:-1])} | this library | best other / ours |")
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for model, step in dict.fromkeys(key[:2] for key in cells):
        rows = [[cells.get((model, step, implementation, scope), {}) for scope in SCOPES] for implementation in IMPLEMENTATIONS]
        tokens = next(cell["thiek"][0] for row in rows for cell in row if cell)
        ratios = []
        for own, *others in zip(rows[-1], *rows[:-1], strict=True):
            best = min((cell["ms"] for cell in others if "ms" in cell), default=None)
            ratios.append(f"{best / own['ms']:.2f}" if best and "ms" in own else "-")
        times = [" / ".join(f"{cell['ms']:.3f}" if "ms" in cell else "-" for cell in row) for row in rows]
        lines.append(f"| {model} | {step} | {tokens} | {' | '.join(times)} | {' / '.join(ratios)} |")
    whys = dict.fromkeys(
        f"{cell['model']}, {cell['step']}, {cell['implementation']}: {cell['why']}" for cell in cells.values() if cell["why"]
    )
    return "\n".join([*lines, "", *(f"- not timed: {why}" for why in whys)]).rstrip() + "\n"


def _chosen(names: str, known: Sequence[str], what: str) -> list[str]:
    chosen = names.split(",") if names else list(known)
    for name in chosen:
        if name not in known:
            raise ValueError(f"{what} {name}: must be of {', '.join(known)}")
    return chosen


def _run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = devices.choose(arguments.device)
    models = _chosen(arguments.models, tuple(MODELS), "--models")
    steps = _chosen(arguments.steps, tuple(STEPS), "--steps")
    effort = {"warmup_s": 0.0, "measure_s": 0.0, "min_repeats": 2} if arguments.tiny else {}
    for name in models:
        layer = build(name, dtype=arguments.dtype, device=device, tiny=arguments.tiny)
        for step_name in steps:
            step = STEPS[step_name]
            if arguments.tiny:
                step = step._replace(sequences=min(step.sequences, 8), length=min(step.length, 4))
            for cell in measure(layer, step_name, step, IMPLEMENTATIONS, **effort):
                told = f"{cell['ms']:.3f} ms" if "ms" in cell else cell["why"]
                print(f"{cell['name']}: {told}", file=sys.stderr, flush=True)
                yield cell


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a cell of this library has not passed; 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m testing.transformers_layers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", metavar="NAMES", default="", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--steps", metavar="NAMES", default="", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES), help="default: bf16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, a few calls: to try the command on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: of a whole run testing/results/transformers-DEVICE.json")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args(argv)
    command = environment.command("python", "-m", "testing.transformers_layers", *(sys.argv[1:] if argv is None else argv))
    try:
        described = environment.describe(str(devices.choose(arguments.device)))
        result = {**described, "command": command, "tiny": arguments.tiny, "cells": list(_run(arguments))}
        result["versions"]["transformers"] = _transformers_version()
        out = arguments.out
        if out is None and not (arguments.tiny or arguments.models or arguments.steps):
            out = RESULTS / f"transformers-{re.sub(r'[^a-z0-9]+', '-', described['device'].lower()).strip('-')}.json"
        if out is not None:
            write_atomically(out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, allow_nan=False) if arguments.json else table({**result, "tiny": False}))
    return 0 if all(cell["passed"] for cell in result["cells"] if cell["implementation"] == OURS) else 1


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    sys.exit(main())
