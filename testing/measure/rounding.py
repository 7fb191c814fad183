"""Suite ``rounding``: token rounding (nearest, tile 128) beside top-K at (16384,4096,1024,256,8).

No tile of a rounded routing may be partly empty, and a routed row must take less time than under top-K in the same run, in inference and
in the forward of training; forward + backward is measured beside them. Both see the same tokens, which each trial draws anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from routing import RouterConfig
from sonicmoe import benchmark, timing
from sonicmoe.thiek import Thiek
from testing.measure.clock import effort
from testing.measure.items import Bound, Item, Options, cell

MODES = {"inference": True, "forward": True, "forward+backward": False}
"""Mode -> whether it must be faster."""
TRIALS = 3


def items(options: Options) -> list[Item]:
    thiek = options.thiek(16384, 4096, 1024, 256, 8)
    return [Item("rounding/beside-top_k", _beside_top_k(options, thiek))]


def _beside_top_k(options: Options, thiek: Thiek) -> Callable[[], list[dict[str, Any]]]:
    def run() -> list[dict[str, Any]]:
        routers = {"top_k": RouterConfig(k=thiek.K), "rounding": options.rounding(thiek.K)}
        tile_m = routers["rounding"].tile_m
        first, _ = options.problem(thiek)
        rows = {method: benchmark.Rows(tile_m) for method in routers}
        trials: list[dict[str, timing.Timing]] = []
        for trial in range(1 if options.quick else TRIALS):
            fresh, variants = first.with_fresh_tokens(options.seed + trial) if trial else first, {}
            for method, router in routers.items():
                case = dataclasses.replace(fresh, router=router)
                layer = case.layer(options.backend)
                with torch.no_grad():
                    rows[method].add(layer(case.x, return_router=True)[1].counts)
                ways = benchmark.layer_variants(layer, case)
                variants |= {f"{mode} {method}": ways[mode] for mode in MODES}
            trials.append(timing.measure(variants, device=options.device, **effort(options)))
        means = {method: counted.means() for method, counted in rows.items()}
        if not means["rounding"]["processed_rows"]:
            raise ValueError("token rounding routed no row")
        about = {"thiek": thiek, "routing": f"nearest, tile_m {tile_m}"}
        wasted = sum(rows["rounding"].hardware) - sum(rows["rounding"].processed)
        shares = {f"{method}_wasted_ratio": means[method]["wasted_ratio"] for method in routers}
        bound = Bound(wasted, "wasted rows", 0, "at most", everywhere=True)
        cells = [cell(options, "rounding/wasted-rows", mode="wasted rows", bound=bound, **about, **shares)]
        for mode, must_be_faster in MODES.items():
            ms = {method: timing.combine([times[f"{mode} {method}"] for times in trials]) for method in routers}
            ns = {method: ms[method].ms * 1e6 / means[method]["processed_rows"] for method in routers}
            cells.append(
                cell(
                    options,
                    f"rounding/{mode}",
                    mode=f"row, {mode}",
                    bound=Bound(ns["rounding"] / ns["top_k"], "of a row's time under top-K", 1.0) if must_be_faster else None,
                    **about,
                    ms=ms["rounding"].ms,
                    ms_spread=ms["rounding"].ms_spread,
                    top_k_ms=ms["top_k"].ms,
                    ns_per_row=ns["rounding"],
                    top_k_ns_per_row=ns["top_k"],
                    rows=means["rounding"]["processed_rows"],
                    top_k_rows=means["top_k"]["processed_rows"],
                )
            )
        return cells

    return run
