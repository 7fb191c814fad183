"""Which layer: the options that `sonicmoe bench`, `sonicmoe profile` and `sonicmoe input` share."""

import argparse
from typing import TYPE_CHECKING

from sonicmoe.names import ACTIVATIONS, BACKENDS, DTYPES, LAYOUTS, ROUNDING_MODES

if TYPE_CHECKING:
    from sonicmoe.benchmark import Problem

ROUTINGS = ("top_k", *ROUNDING_MODES)
DEFAULTS = {
    "routing": "top_k",
    "tile_m": 128,
    "activation": "swiglu",
    "bias": False,
    "dtype": "bf16",
    "layout": "interleaved",
    "backend": "auto",
    "seed": None,
}
"""Of the options that only a layer has."""


def add_arguments(parser: argparse.ArgumentParser, *, thiek: str | None = None, required: bool = False) -> None:
    """Add them; ``thiek`` is the default size, None where there is none."""
    sizes = "tokens, hidden size, intermediate size, experts, experts per token" + (f" (default: {thiek})" if thiek else "")
    parser.add_argument("--thiek", required=required, default=thiek, metavar="T,H,I,E,K", help=sizes)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--routing", choices=ROUTINGS, help="top_k, or token rounding in this mode (default: top_k)")
    parser.add_argument("--tile-m", type=int, metavar="ROWS", help="rows per tile, of token rounding and of hardware rows (128)")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), help="default: swiglu")
    parser.add_argument("--bias", action="store_true", help="give both projections a bias")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16")
    parser.add_argument("--layout", choices=LAYOUTS, help="of gate and up in w_up (default: interleaved)")
    parser.add_argument("--backend", choices=BACKENDS, help="default: auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: the GPU where there is one)")
    parser.add_argument("--seed", type=int, help="of all random numbers (default: a fresh one, which is printed)")


def read(args: argparse.Namespace, *, what: str) -> "Problem":
    """The problem that the options describe; ``what`` is done to it ("timed"), for errors.

    Raises:
        ValueError: sizes or options that no layer can have.
    """
    import secrets

    from routing import RouterConfig
    from sonicmoe import backends, devices, thiek
    from sonicmoe.benchmark import Problem
    from sonicmoe.cases import DTYPES as TORCH_DTYPES

    sizes = thiek.parse(args.thiek)
    if sizes.T < 1:
        raise ValueError(f"T={sizes.T}: must be at least 1 to be {what}")
    method = {"method": "top_k"} if args.routing == "top_k" else {"method": "token_rounding", "mode": args.routing}
    device = devices.choose(args.device)
    return Problem(
        sizes,
        RouterConfig(k=sizes.K, tile_m=args.tile_m, **method),
        device,
        dtype=args.dtype,
        activation=args.activation,
        bias=args.bias,
        gate_up_layout=args.layout,
        backend=backends.resolve(args.backend, device, TORCH_DTYPES[args.dtype]),
        seed=secrets.randbelow(2**31) if args.seed is None else args.seed,
    )
