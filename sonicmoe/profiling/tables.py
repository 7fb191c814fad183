"""The tables as plain text cells, for the terminal and the page alike."""

from dataclasses import dataclass

from sonicmoe.profiling.analysis import Profile
from sonicmoe.profiling.kernels import Rate
from sonicmoe.profiling.memory import PageableCopy

MOST_ROWS = 20


@dataclass(frozen=True)
class Table:
    """A heading, columns (label, whether it holds numbers), rows of as many cells, and a sentence below."""

    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[str]]
    note: str = ""


def all_tables(profile: Profile) -> list[Table]:
    """Those that the trace gives, in the order in which one reads them; empty ones are left out."""
    if profile.steady is None:
        return [table for table in (operations(profile), host(profile)) if table.rows]
    tables = (kernels(profile), operations(profile), memory(profile), gap_causes(profile), pageable(profile), host(profile))
    return [table for table in tables if table.rows]


def headline(profile: Profile) -> list[tuple[str, str]]:
    """(label, value) of the numbers that one reads first."""
    if profile.steady is None:
        step = [("median host time of a step", milliseconds(profile.step_us))] if profile.step_us is not None else []
        return [*step, ("GPU", "none in this trace")]
    steady = profile.steady
    shown = [(f"GPU {one.device} busy" if len(profile.busy) > 1 else "GPU busy", f"{one.share:.2%}") for one in profile.busy]
    if steady.steps:
        shown += [("a step", milliseconds(profile.step_us)), ("steps", str(steady.steps))]
    else:
        shown.append(("whole recording", milliseconds(steady.duration)))
    shown.append(("kernels alone", f"{max(one.kernel_share for one in profile.busy):.2%}"))
    idle = max((1 - one.share) * steady.duration for one in profile.busy) / (steady.steps or 1)
    shown.append(("idle a step" if steady.steps else "idle", milliseconds(idle)))
    if profile.pageable:
        shown.append(("pageable copies a step" if steady.steps else "pageable copies", _per_step(len(profile.pageable), profile)))
    return shown


def milliseconds(us: float) -> str:
    return f"{us / 1e3:.3f} ms"


def time_text(us: float) -> str:
    return f"{us:.1f} us" if us < 1e3 else milliseconds(us)


def kernels(profile: Profile) -> Table:
    rows = [
        [
            _cut(row.name, 48),
            _cut(row.operation, 40),
            str(row.count),
            f"{row.total_us / 1e3:.3f}",
            f"{row.mean_us:.1f}",
            f"{row.share:.1%}",
            *_rate(row.rate),
        ]
        for row in profile.kernels[:MOST_ROWS]
    ]
    left = profile.kernels[MOST_ROWS:]
    if left:
        time = sum(row.total_us for row in left)
        share = sum(row.share for row in left)
        rows.append([f"{len(left)} more", "", str(sum(row.count for row in left)), f"{time / 1e3:.3f}", "", f"{share:.1%}", "", ""])
    columns = [("kernel", False), ("operation", False)]
    columns += [(label, True) for label in ("count", "ms", "mean us", "share", "rate", "of floor")]
    note = f"share of all kernels' time; floor time / time, rates {profile.peaks.source}; none where a kernel's work is not known"
    return Table("Kernels by time", columns, rows, note)


def operations(profile: Profile) -> Table:
    gpu = profile.steady is not None
    rows = [
        [row.name, str(row.calls), *([f"{row.gpu_us / 1e3:.3f}"] if gpu else []), f"{row.host_us / 1e3:.3f}", *_rate(row.rate)[: 1 + gpu]]
        for row in profile.operations
    ]
    labels = ("calls", "GPU ms", "host ms", "rate", "of floor") if gpu else ("calls", "host ms", "rate on the host")
    note = "all GPU work of a call; host ms: of the call itself" if gpu else ""
    return Table("The layer's operations", [("operation", False), *((label, True) for label in labels)], rows, note)


def memory(profile: Profile) -> Table:
    rows = [
        [
            row.kind,
            str(row.count),
            f"{row.total_mb:.3f}",
            *(f"{value:.4g}" for value in (row.mean_mb, row.median_mb, row.min_mb, row.max_mb, row.deviation_mb)),
            f"{row.total_us / 1e3:.3f}",
            "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        ]
        for row in profile.memory
    ]
    labels = ("count", "total MB", "average MB", "median MB", "min MB", "max MB", "deviation MB", "ms", "GB/s")
    return Table("Memory operations by kind", [("kind", False), *((label, True) for label in labels)], rows, "MB of 10^6 bytes")


def gap_causes(profile: Profile) -> Table:
    rows = [
        [
            str(row.stream),
            row.kind,
            _cut(row.call, 60),
            _cut(row.operator, 40),
            str(row.count),
            *(f"{value:.1f}" for value in (row.total_us, row.idle_us, row.longest_us)),
        ]
        for row in profile.gap_causes[:MOST_ROWS]
    ]
    columns = [("stream", True), ("cause", False), ("call", False), ("within", False)]
    columns += [(label, True) for label in ("gaps", "us", "idle us", "longest us")]
    return Table("Gaps by cause", columns, rows, "us on the stream; idle: while no other stream was busy either")


def pageable(profile: Profile) -> Table:
    groups: dict[tuple[str, int], list[PageableCopy]] = {}
    for one in profile.pageable:
        groups.setdefault((one.where or f"not recorded ({one.operator or 'no operator'})", one.bytes), []).append(one)
    rows = []
    for (where, size), own in sorted(groups.items(), key=lambda group: -sum(one.duration_us for one in group[1])):
        held = [one.host_us for one in own if one.host_us is not None]
        mean, saved = sum(one.duration_us for one in own) / len(own), sum(one.saved_us for one in own) / len(own)
        host = f"{sum(held) / len(held) / 1e3:.3f}" if held else ""
        rows.append([where, f"{size / 1e6:.4g}", _per_step(len(own), profile), f"{mean / 1e3:.3f}", host, f"{saved / 1e3:.3f}"])
    labels = (
        "MB",
        "copies a step" if profile.steady and profile.steady.steps else "copies",
        "ms each",
        "host held ms",
        "pinning saves ms each",
    )
    rate, source = profile.pinned_rate
    note = f"copies from pageable host memory; pinned ones taken to run at {rate / 1e9:.1f} GB/s, {source}"
    return Table("Pageable copies to the device", [("made by", False), *((label, True) for label in labels)], rows, note)


def host(profile: Profile) -> Table:
    rows = [[_cut(row.name, 60), str(row.count), f"{row.own_us / 1e3:.3f}"] for row in profile.host[:MOST_ROWS]]
    return Table(
        "The host by own time", [("operator or call", False), ("count", True), ("own ms", True)], rows, "all marked steps, all threads"
    )


def _rate(rate: Rate | None) -> list[str]:
    if rate is None:
        return ["", ""]
    speed = f"{rate.tflops:.3g} TFLOPS" if rate.tflops is not None else f"{rate.gb_per_s:.4g} GB/s"
    return [speed, "" if rate.of_floor is None else f"{rate.of_floor:.1%}"]


def _per_step(count: int, profile: Profile) -> str:
    steps = (profile.steady.steps if profile.steady else None) or 1
    return f"{count / steps:.4g}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
