"""The profile as one self-contained HTML page: no script, no external file, readable on a laptop and on a phone."""

from html import escape

from sonicmoe.profiling import tables, timeline
from sonicmoe.profiling.analysis import GAP_US, Profile
from sonicmoe.profiling.gaps import Gap
from sonicmoe.profiling.intervals import Interval
from sonicmoe.profiling.trace import Trace

CLOSE_UPS = 3

_STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #dde2e9; --page: #f5f7fa; --card: #fff; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--page); }
main { max-width: 1200px; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; } h3 { font-size: .95rem; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .83rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .55rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: #eef1f5; font-weight: 600; } td.n, th.n { text-align: right; } tr:last-child td { border-bottom: 0; }
td:first-child { max-width: 24rem; overflow: hidden; text-overflow: ellipsis; }
@media (max-width: 760px) { main { padding: .8rem; } h1 { font-size: 1.25rem; } .tile b { font-size: 1.1rem; } }
@media (max-width: 760px) { td:first-child { max-width: 12rem; } }
"""


def page(trace: Trace, profile: Profile, *, title: str, described: str) -> str:
    """The page; ``described`` says what was run and where."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{timeline.STYLE}</style></head><body><main>"
    )
    lines = "".join(f'<p class="soft">{escape(line)}</p>' for line in described.splitlines())
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in tables.headline(profile)
    )
    missing = f'<p class="soft">{escape(needs_gpu_text(profile))}</p>' if profile.needs_gpu else ""
    body = _timelines(trace, profile) + "".join(map(_table, tables.all_tables(profile)))
    return f'{head}<h1>{escape(title)}</h1>{lines}<div class="tiles">{tiles}</div>{missing}{body}</main></body></html>\n'


def needs_gpu_text(profile: Profile) -> str:
    """Which tables a trace without GPU activity does not give, in one sentence; empty where it gives all."""
    return f"Not there without a GPU: {', '.join(profile.needs_gpu)}." if profile.needs_gpu else ""


def shown_step(trace: Trace, profile: Profile) -> Interval | None:
    """The piece that the large timeline shows: the steady state's first step, else what there is; None where there is nothing."""
    if profile.steady is not None:
        length = profile.step_us or profile.steady.duration
        return (profile.steady.begin, profile.steady.begin + length) if length > 0 else None
    if trace.steps:
        step = trace.steps[min(1, len(trace.steps) - 1)]
        return (step.begin, step.end) if step.end > step.begin else None
    events = list(trace.host_events())
    window = (min(event.begin for event in events), max(event.end for event in events)) if events else (0.0, 0.0)
    return window if window[1] > window[0] else None


def _timelines(trace: Trace, profile: Profile) -> str:
    window = shown_step(trace, profile)
    if window is None:
        return ""
    colors = timeline.Colors(trace, profile.steady.window if profile.steady else window)
    whole = "Timeline of one step" if trace.steps else "Timeline"
    text = f"<h2>{whole}</h2>{colors.legend() if trace.gpu else ''}{timeline.draw(trace, window, colors, least_idle_us=GAP_US)}"
    longest = sorted(profile.gaps, key=lambda gap: -gap.idle_us)[:CLOSE_UPS]
    closer = "".join(_close_up(trace, gap, colors) for gap in longest if gap.idle_us > 0)
    return text + (f"<h2>The longest gaps</h2>{closer}" if closer else "")


def _close_up(trace: Trace, gap: Gap, colors: timeline.Colors) -> str:
    margin = max(gap.duration_us, 2 * GAP_US)
    window = gap.begin_us - margin, gap.begin_us + gap.duration_us + margin
    within = f" in {gap.operator}" if gap.operator else ""
    line = f", {gap.where}" if gap.where else ""
    place = f"{tables.time_text(gap.duration_us)} on stream {gap.stream}, after {gap.before}, before {gap.after}"
    text = f"{place}: {gap.kind}: {gap.call}{within}{line}"
    return f"<h3>{escape(text)}</h3>{timeline.draw(trace, window, colors, least_idle_us=1.0)}"


def _table(table: tables.Table) -> str:
    css = ["n" if numeric else "" for _, numeric in table.columns]
    head = "".join(f'<th class="{own}">{escape(label)}</th>' for (label, _), own in zip(table.columns, css, strict=True))

    def cells(row: list[str]) -> str:
        return "".join(f'<td class="{own}" title="{escape(cell)}">{escape(cell)}</td>' for cell, own in zip(row, css, strict=True))

    body = "".join(f"<tr>{cells(row)}</tr>" for row in table.rows)
    note = f'<p class="soft">{escape(table.note)}</p>' if table.note else ""
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(table.title)}</h2><div class="scroll">{grid}</div>{note}'
