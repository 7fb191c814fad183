"""What the sections of the HTML report share: the style, tables and colours."""

from html import escape

STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #dde2e9; --page: #f5f7fa; --card: #fff; --good: #1a7f4b; --bad: #b3261e; --wait: #8a6100; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: var(--page); }
main { max-width: 1200px; margin: 0 auto; padding: 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.badge { color: #fff; border-radius: .4rem; padding: .1rem .6rem; font-size: 1rem; letter-spacing: .04em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .55rem .8rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .8rem; }
.passed { color: var(--good); } .failed, .missing { color: var(--bad); font-weight: 600; }
.not-run, .no-threshold-yet { color: var(--wait); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-size: .83rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .55rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: #eef1f5; font-weight: 600; }
td.n, th.n { text-align: right; } td.why { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
.list td:first-child, .list th:first-child { position: sticky; left: 0; background: var(--card); }
.list th:first-child { background: #eef1f5; }
.maps { columns: 2; column-gap: 1rem; }
.map { break-inside: avoid; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.map { margin: 0 0 1rem; padding: .5rem .6rem; }
.map h3, .load h3 { margin: 0; font-size: .92rem; } .map p, .load p { font-size: .78rem; color: var(--soft); margin: 0 0 .3rem; }
.map table { table-layout: fixed; } .map th, .map td { border: 0; padding: 1px; font-size: .72rem; background: none; text-align: center; }
.map th { vertical-align: bottom; line-height: 1.1; font-weight: 600; }
.map th:first-child, .map td:first-child { width: 34%; text-align: left; overflow: hidden; text-overflow: ellipsis; }
.map i { display: block; font-style: normal; border-radius: 3px; padding: .1rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; font-size: .78rem; margin: .4rem 0 .8rem; }
.legend i { font-style: normal; border-radius: 3px; padding: .1rem .5rem; }
.legend i.dot { padding: .1rem .2rem; } .legend i.dot::before { content: "\\25CF"; color: var(--dot); margin-right: .25rem; }
.loads { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .8rem; }
.load { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; min-width: 0; }
.load table { font-size: .8rem; } .load th, .load td { padding: .2rem .3rem; background: none; }
.chart { display: block; width: 100%; max-width: 620px; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.chart text { font-size: 11px; fill: var(--soft); } .chart .grid { stroke: var(--line); stroke-width: .7; }
.chart .roof { fill: none; stroke: var(--ink); stroke-width: 1.4; } .chart circle { fill-opacity: .85; stroke: #fff; stroke-width: .6; }
.spark { width: 100px; height: 26px; display: block; } .spark polyline { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.spark circle { fill: var(--ink); }
summary { cursor: pointer; color: var(--soft); font-size: .87rem; margin: .6rem 0; }
@media (max-width: 760px) {
  main { padding: .8rem; } .maps { columns: 1; } h1 { font-size: 1.25rem; } .tile b { font-size: 1.1rem; }
  .list td:first-child, .list th:first-child { white-space: normal; overflow-wrap: anywhere; width: 7.5rem; min-width: 7.5rem; }
  .map td:first-child { white-space: normal; overflow-wrap: anywhere; }
}
"""

STEPS = (0.25, 0.5, 0.7, 0.85, 1.0)
COLOURS = ("#cdeedd", "#e2f2c6", "#f8efb4", "#fbdcaa", "#f7c1a3", "#b3261e")
"""From far below a limit to above it."""


def name(text: str) -> str:
    """A cell's name as HTML, which a narrow column may break behind a slash or a plus."""
    return escape(text).replace("/", "/<wbr>").replace("+", "+<wbr>")


def colour(share: float) -> str:
    """The colour of a value that is this share of its limit."""
    return next((colour for step, colour in zip(STEPS, COLOURS, strict=False) if share <= step), COLOURS[-1])


def square(text: str, share: float, title: str) -> str:
    """One coloured cell of a heat map."""
    ink = "#fff" if share > 1 else "inherit"
    return f'<td><i style="background:{colour(share)};color:{ink}" title="{escape(title)}">{escape(text)}</i></td>'


def legend(labels: list[str]) -> str:
    """What the colours mean, from far below the limit to above it."""
    items = "".join(
        f'<i style="background:{colour};color:{"#fff" if colour == COLOURS[-1] else "inherit"}">{escape(label)}</i>'
        for colour, label in zip(COLOURS, labels, strict=True)
    )
    return f'<div class="legend">{items}</div>'


def table(head: list[tuple[str, str]], rows: list[list[str]]) -> str:
    """head: (label, class of the column); rows: cells that are already HTML."""
    header = "".join(f'<th class="{css}">{escape(label)}</th>' for label, css in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="{css}">{value}</td>' for value, (_, css) in zip(row, head, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="scroll list"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
