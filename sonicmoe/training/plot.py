"""curves.png: loss curves of all routings and the load of every expert over time, drawn from metrics.json's content."""

import math
from pathlib import Path

import numpy as np

from sonicmoe.training.files import replace_file

# Okabe-Ito: told apart with any colour vision.
_COLOURS = {"top_k": "#0072B2", "nearest": "#D55E00", "up": "#009E73", "down": "#CC79A7", "stochastic": "#E69F00", "balanced": "#56B4E9"}
_GREY = "#666666"
_NAMES = {"top_k": "top-K"}


def routing_name(routing: str) -> str:
    """As people read it: "top-K", "token rounding (nearest)"."""
    return _NAMES.get(routing, f"token rounding ({routing})")


def require_matplotlib() -> None:
    """Raise ValueError, before any training, where curves.png could not be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed and curves.png needs it: pip install 'sonicmoe[plot]'") from None


def draw(metrics: dict, path: Path) -> None:
    """Write the figure, in whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    routings = list(metrics["results"])
    compared = routings[1:]
    figure = Figure(figsize=(10, 10), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, len(routings), height_ratios=[1, 0.3 if compared else 0.01, 1.05])
    losses = figure.add_subplot(grid[0, :])
    _draw_losses(losses, metrics)
    if compared:
        losses.set_xlabel("")
        _draw_differences(figure.add_subplot(grid[1, :], sharex=losses), metrics, routings[0], compared)
    axes = [figure.add_subplot(grid[2, column]) for column in range(len(routings))]
    for axis, routing in zip(axes, routings, strict=True):
        image = _draw_load(axis, metrics, routing, label_layers=axis is axes[0])
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.015, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    bar.set_label("rows of the expert / even share (T·K/E per step)")
    bar.outline.set_visible(False)
    with replace_file(path) as file:
        figure.savefig(file, format="png")


def _draw_losses(axis, metrics: dict) -> None:
    config = metrics["config"]
    for routing, result in metrics["results"].items():
        colour, history = _COLOURS[routing], result["history"]
        loss = np.array(history["loss"])
        axis.plot(np.arange(1, loss.size + 1), loss, color=colour, alpha=0.35, linewidth=0.9)
        steps, validation = np.array(history["validation"]).T
        label = f"{routing_name(routing)}: validation {validation[-1]:.3f} ({validation[-1] / math.log(2):.3f} bits per byte)"
        line, marker = ("-", "o") if routing == "top_k" else ("--", "s")
        axis.plot(steps, validation, color=colour, linewidth=1.6, linestyle=line, marker=marker, markersize=4, label=label)
    axis.plot([], [], color=_GREY, alpha=0.5, linewidth=0.9, label="thin: training, as routed in training; thick: validation, always top-K")
    for name, loss in metrics["baselines"].items():
        axis.axhline(loss, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axis.annotate(f"{name} frequencies {loss:.2f}", (1, loss), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", color=_GREY, fontsize=9)  # fmt: skip
    axis.set_xlim(0, config["steps"])
    axis.set_xlabel("step")
    axis.set_ylabel("loss, nats per byte")
    bits = axis.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per byte")
    bits.spines["right"].set_visible(False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=9)
    axis.set_title(
        f"Language model with {config['layers']} MoE layers on {Path(metrics['text']['name']).name}: H={config['hidden_size']}, "
        f"I={config['intermediate_size']}, E={config['num_experts']}, K={config['experts_per_token']}, T={metrics['tokens_per_step']}",
        loc="left", fontsize=11,
    )  # fmt: skip


def _draw_differences(axis, metrics: dict, first: str, compared: list[str]) -> None:
    """What a few hundredths of a nat between the curves above would hide."""
    steps, base = np.array(metrics["results"][first]["history"]["validation"]).T
    axis.axhline(0, color=_COLOURS[first], linewidth=1.6)
    for routing in compared:
        _, validation = np.array(metrics["results"][routing]["history"]["validation"]).T
        axis.plot(steps, validation - base, color=_COLOURS[routing], linewidth=1.6, linestyle="--", marker="s", markersize=4)
    axis.set_xlabel("step")
    axis.set_ylabel(f"validation loss\nminus {routing_name(first)}'s")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_load(axis, metrics: dict, routing: str, *, label_layers: bool):
    """Rows over their even share, log2 colours, one line per expert; each layer's busiest expert on top."""
    config = metrics["config"]
    load = np.array(metrics["results"][routing]["history"]["load"], dtype=np.float64)
    periods, layers, experts = load.shape
    lengths = np.diff(np.array(metrics["load_steps"]), prepend=0)
    share = load / (metrics["tokens_per_step"] * config["experts_per_token"] / experts * lengths[:, None, None])
    order = np.argsort(-load.sum(axis=0), axis=1, kind="stable")
    lines = np.take_along_axis(share, order[None], axis=2).reshape(periods, layers * experts).T
    image = axis.imshow(
        np.log2(np.maximum(lines, 2.0**-8)), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=-2, vmax=2,
        extent=(0, metrics["load_steps"][-1], layers * experts, 0),
    )  # fmt: skip
    for layer in range(1, layers):
        axis.axhline(layer * experts, color="white", linewidth=2)
    axis.set_yticks((np.arange(layers) + 0.5) * experts, [f"layer {layer + 1}" if label_layers else "" for layer in range(layers)])
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("step")
    wasted = metrics["results"][routing]["wasted_row_ratio"]
    axis.set_title(
        f"Experts' load, {routing_name(routing)}\n{wasted:.1%} of the rows of {config['tile_m']}-row tiles wasted", loc="left", fontsize=11
    )
    return image
