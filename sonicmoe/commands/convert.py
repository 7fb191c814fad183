"""``sonicmoe convert``: a checkpoint's experts, one by one or as this library stores them."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

from sonicmoe.names import LAYOUTS

FORMS = ("sonicmoe", "gate_up_down", "w1w2w3")

DESCRIPTION = """Write a safetensors checkpoint anew with its experts in another form: from one tensor for each expert and projection
(gate_proj, up_proj, down_proj, or w1, w3, w2) to w_up and w_down of sonicmoe.MoE, or back. Values keep their bits and all other
tensors are copied; at most one expert is in memory. Everything is checked before anything is written, and TARGET appears only when
it is whole."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("source", metavar="SOURCE", type=Path, help="safetensors file, or a folder of them")
    parser.add_argument("target", metavar="TARGET", type=Path, help="new folder")
    parser.add_argument("--to", default="sonicmoe", choices=FORMS, help="the form to write (default: sonicmoe)")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of gate and up in w_up (default: interleaved; from sonicmoe: what the checkpoint says)",
    )
    parser.add_argument("--shard-gb", type=_size, default=5, metavar="GB", help="size of a file, where no tensor is larger (default: 5)")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Returns 0. User errors are ValueErrors."""
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ValueError("safetensors is not installed and checkpoints need it: pip install 'sonicmoe[checkpoints]'") from None
    from rich.console import Console

    from sonicmoe import checkpoints
    from sonicmoe.commands import tables

    try:
        with tables.progress() as bar:
            task = bar.add_task(f"writing {args.target}", total=None)
            done = checkpoints.convert(
                args.source,
                args.target,
                to=args.to,
                gate_up_layout=args.layout,
                shard_bytes=int(args.shard_gb * 1e9),
                progress=lambda written, total: bar.update(task, completed=written, total=total),
            )
    except OSError as error:  # no permission, no space: the machine's fault, in the system's words
        raise ValueError(str(error)) from error
    if args.json:
        print(json.dumps({"target": str(args.target), "to": args.to, **dataclasses.asdict(done)}, indent=2))
    else:
        Console().print(
            f"{args.target}: {done.layers} layers to {args.to} ({done.gate_up_layout}), {done.tensors} tensors, "
            f"{done.bytes / 1e9:.3f} GB in {len(done.files)} files",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _size(text: str) -> float:
    size = float(text)
    if not 1e-9 <= size < math.inf:
        raise ValueError
    return size
