"""``sonicmoe train``: a small MoE language model, top-K against token rounding, on text that every Python has."""

import argparse
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from sonicmoe.commands import parallel_options
from sonicmoe.names import BACKENDS
from sonicmoe.training.config import TrainConfig

DESCRIPTION = """Train a small decoder-only language model whose feed-forward layers are sonicmoe.MoE, on the Python language
documentation that ships with Python or on a text of yours. With --routing both, a model routed by top-K and one routed by token
rounding start from the same weights and see the same batches. Validation always routes by top-K, as in the SonicMoE paper:
token rounding is a method for training. Writes metrics.json, curves.png, routing.npz (recorded routing) and checkpoint.pt to
--out; Ctrl-C saves a checkpoint and stops. Under torchrun, --expert-parallel N spreads the experts over N processes, each of which has a
share of every batch; when torchrun restarts them after a failure they continue from the last checkpoint."""

_CHECKPOINT = "checkpoint.pt"
_PREVIOUS = "checkpoint.previous.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--data", metavar="PATH", help="text file, or a folder of them (default: pydoc_data.topics)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for the results (default: out/train; with --resume, its folder)")
    parser.add_argument(
        "--resume", metavar="PATH", type=Path, help="checkpoint, or the folder it is in; keeps the options it was made with"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parallel_options.add_arguments(parser, transport=False)
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="of the experts (default: auto)")
    for field in dataclasses.fields(TrainConfig):
        choices = field.metadata["choices"]
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type,
            choices=choices,
            metavar=None if choices else field.name.rsplit("_", 1)[-1].upper(),
            help=f"{field.metadata['help']} (default: {field.default})",
        )


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where the loss is no longer finite; 128 + signal number after a signal. User errors are ValueErrors."""
    from sonicmoe import devices
    from sonicmoe.training import text
    from sonicmoe.training.experiment import Experiment, read_checkpoint
    from sonicmoe.training.files import prepare_folder
    from sonicmoe.training.learner import NonFiniteLossError
    from sonicmoe.training.plot import require_matplotlib

    processes = _join(args)
    resume = args.resume / _CHECKPOINT if args.resume and args.resume.is_dir() else args.resume
    if processes is not None:
        resume = _continue_after_restart(processes, args.out or (resume.parent if resume else Path("out/train")), resume)
    checkpoint = read_checkpoint(resume) if resume else None
    config = _config(args, checkpoint)
    config.validate()
    device = devices.choose(args.device) if processes is None else processes.device
    require_matplotlib()
    source = args.data
    if source is None and checkpoint is not None and checkpoint["text"]["name"] != text.BUILT_IN:
        source = checkpoint["text"]["name"]
    shares = _shares(processes, config, args)
    experiment = Experiment(config, text.load(source, config.context), device=device, backend=args.backend, shares=shares)
    if checkpoint is not None:
        experiment.restore(resume, checkpoint)
    out = args.out or (resume.parent if resume else Path("out/train"))
    prepare_folder(out)
    begin = time.perf_counter()
    collective_error = _peer_error() if processes is not None else ()
    try:
        with _StopOnSignal() as stop:
            _train(experiment, out / _CHECKPOINT, stop)
        if not experiment.finished:
            return _report_stop(experiment, stop.received or signal.SIGTERM, as_json=args.json)
        metrics = _metrics(experiment, seconds=time.perf_counter() - begin, resumed=checkpoint is not None)
        recording = experiment.recording()
        experiment.shares.write(lambda: _write_results(experiment, recording, metrics, out))
    except NonFiniteLossError as error:
        print(f"sonicmoe train: the loss is no longer finite ({error}); {_kept(experiment)}", file=sys.stderr)
        return 1
    except collective_error as error:
        print(f"sonicmoe train: {error}; {_kept(experiment)}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    if experiment.shares.first:
        _report(metrics, out, as_json=args.json)
    if processes is not None:
        processes.leave()
    return 0


def _kept(experiment) -> str:
    return f"the last good checkpoint is {experiment.saved}" if experiment.saved else "no checkpoint had been written yet"


def _join(args: argparse.Namespace):
    """The processes of ``--expert-parallel``, or None without it."""
    parallel_options.check(args)
    if args.expert_parallel is None:
        return None
    from sonicmoe.parallel import launch

    return launch.start(args.expert_parallel, args.device, timeout_s=args.timeout, command="train")


def _shares(processes, config: TrainConfig, args: argparse.Namespace):
    from sonicmoe.training.shares import Alone, Shares

    if processes is None:
        return Alone()
    return Shares(processes, batch_size=config.batch_size, chunks=args.chunks)


def _continue_after_restart(processes, out: Path, resume: Path | None) -> Path | None:
    """The checkpoint to start from: the one in ``out`` where torchrun has restarted us, else what was asked for.

    A first start moves a checkpoint of an earlier run out of the way, lest a restart before our first one takes it for ours.
    """
    from sonicmoe.parallel import launch

    ours = out / _CHECKPOINT
    if launch.restarts():
        return ours if ours.exists() else resume

    def move_away() -> None:
        if ours.exists() and not (resume and resume.exists() and ours.samefile(resume)):
            ours.rename(out / _PREVIOUS)

    processes.first_does(move_away)
    return resume


def _peer_error() -> type[Exception]:
    from sonicmoe.parallel import PeerError

    return PeerError


def _config(args: argparse.Namespace, checkpoint: dict | None) -> TrainConfig:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if checkpoint is None:
        return TrainConfig(**given)
    saved = TrainConfig(**checkpoint["config"])
    for name, value in given.items():
        if value != getattr(saved, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {value}: the checkpoint was made with {getattr(saved, name)}, and a resumed run keeps its options")
    return saved


class _StopOnSignal:
    """Within the block, SIGINT and SIGTERM only ask for the end, so that a step and its checkpoint are never cut in two.

    A second signal is not waited for: it interrupts as it would without us.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> "_StopOnSignal":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _train(experiment, checkpoint: Path, stop: _StopOnSignal) -> None:
    """Advance to the end or until asked to stop, with a checkpoint where one is due and at the end of either."""
    with _Progress(experiment) as progress:
        while not experiment.finished and not experiment.shares.any(stop.received is not None):
            experiment.advance()
            progress.update()
            if experiment.checkpoint_due:
                experiment.save(checkpoint)
        if not experiment.finished:
            experiment.save(checkpoint)


class _Progress:
    """On a terminal, a live bar per routing; elsewhere, a line per evaluation. Both on stderr."""

    _RECENT_STEPS = 10

    def __init__(self, experiment) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from sonicmoe.training.plot import routing_name

        self._experiment = experiment
        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} validation {task.fields[validation]} [dim]{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("[dim]ETA"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            disable=not self._console.is_terminal or not experiment.shares.first,
        )
        self._tasks = {
            routing: self._bars.add_task(
                routing_name(routing),
                total=experiment.config.steps,
                completed=experiment.step,
                loss="-",
                validation="-",
                speed="-",
            )
            for routing in experiment.learners
        }

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def update(self) -> None:
        experiment = self._experiment
        for routing, learner in experiment.learners.items():
            history = learner.history
            recent = history.seconds[-self._RECENT_STEPS :]
            loss, (evaluated, validation) = history.loss[-1], history.validation[-1]
            speed = experiment.config.tokens_per_step * len(recent) / sum(recent)
            self._bars.update(
                self._tasks[routing], completed=experiment.step, loss=f"{loss:.3f}", validation=f"{validation:.3f}", speed=f"{speed:,.0f}"
            )
            if not self._console.is_terminal and evaluated == experiment.step and experiment.shares.first:
                position = f"step {experiment.step}/{experiment.config.steps} {routing}"
                print(f"{position}: loss {loss:.3f} validation {validation:.3f} {speed:,.0f} tokens/s", file=sys.stderr, flush=True)


def _metrics(experiment, *, seconds: float, resumed: bool) -> dict:
    from sonicmoe import environment

    text = experiment.text
    return {
        **environment.describe(str(experiment.device)),
        "config": dataclasses.asdict(experiment.config),
        "text": {
            "name": text.name,
            "sha256": text.sha256,
            "training_bytes": text.train.numel(),
            "validation_bytes": text.validation.numel(),
            "validation_bytes_used": experiment.validation_tokens,
        },
        "tokens_per_step": experiment.config.tokens_per_step,
        "seconds": seconds,
        "resumed": resumed,
        "processes": experiment.shares.processes_used,
        "baselines": experiment.baselines,
        "load_steps": experiment.period_ends(),
        "results": experiment.results(),
    }


def _write_results(experiment, recording, metrics: dict, out: Path) -> None:
    from sonicmoe.training import plot
    from sonicmoe.training.files import replace_file
    from sonicmoe.training.recorded import save_recording

    save_recording(out / "routing.npz", recording)
    plot.draw(metrics, out / "curves.png")
    with replace_file(out / "metrics.json") as file:
        file.write(json.dumps(metrics, allow_nan=False).encode() + b"\n")


def _report_stop(experiment, received: signal.Signals, *, as_json: bool) -> int:
    if not experiment.shares.first:
        return 128 + received
    print(
        f"sonicmoe train: stopped by {received.name} after step {experiment.step} of {experiment.config.steps}; "
        f"continue with --resume {experiment.saved}",
        file=sys.stderr,
    )
    if as_json:
        print(json.dumps({"finished": False, "step": experiment.step, "checkpoint": str(experiment.saved)}))
    return 128 + received


def _report(metrics: dict, out: Path, *, as_json: bool) -> None:
    files = {name: str(out / name) for name in ("metrics.json", "curves.png", "routing.npz", _CHECKPOINT)}
    if as_json:
        results = {
            routing: {name: value for name, value in result.items() if name != "history"} for routing, result in metrics["results"].items()
        }
        print(json.dumps({**metrics, "finished": True, "results": results, "files": files}, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    from sonicmoe.training.plot import routing_name

    config, text = metrics["config"], metrics["text"]
    table = Table(title=f"{config['steps']} steps of {metrics['tokens_per_step']} bytes of {text['name']}")
    table.add_column("trained with (loss: nats per byte)")
    for routing in metrics["results"]:
        table.add_column(routing_name(routing), justify="right")
    results = metrics["results"].values()
    for label, cell in (
        ("validation loss, start", lambda r: f"{r['validation_loss_start']:.3f}"),
        ("validation loss, end", lambda r: f"[bold]{r['validation_loss']:.3f}"),
        ("bits per byte, start", lambda r: f"{r['bits_per_byte_start']:.3f}"),
        ("bits per byte, end", lambda r: f"[bold]{r['bits_per_byte']:.3f}"),
        ("baseline: unigram loss", lambda r: f"{metrics['baselines']['unigram']:.3f}"),
        ("baseline: bigram loss", lambda r: f"{metrics['baselines']['bigram']:.3f}"),
        ("training tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"),
        ("routed rows", lambda r: f"{r['rows']:,}"),
        ("dropped against top-K", lambda r: f"{r['dropped_rows']:,} ({r['dropped_rows'] / r['rows']:.1%})"),
        ("added against top-K", lambda r: f"{r['added_rows']:,} ({r['added_rows'] / r['rows']:.1%})"),
        (f"wasted rows, tiles of {config['tile_m']}", lambda r: f"{r['wasted_row_ratio']:.1%}"),
        ("load imbalance, max/mean", lambda r: f"{r['load_imbalance']:.2f}"),
    ):
        table.add_row(label, *map(cell, results))
    console = Console()
    console.print(table)
    console.print(f"Validation always routes by top-K. {metrics['seconds']:.0f} s; written to {out}: {', '.join(files)}", highlight=False)
