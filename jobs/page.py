"""The report's style and tables."""

from __future__ import annotations

import html
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d0d0d0; --quiet: #666; --bar: #c9d3de;
        --right: #8fcf9f; --green: #1f7a38; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --quiet: #a5a5a5; --bar: #3a4653; --right: #2f6b41;
          --green: #7fd495; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem; }
.sharp { image-rendering: pixelated; width: 100%; max-width: 48rem; display: block; }
.sharp + figcaption { font-weight: 400; color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { white-space: normal; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.card { display: flex; gap: .75rem; } .card > div { flex: 1; min-width: 0; }
.card figcaption { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; line-height: 1.3; }
.thumbnail { width: 112px; height: 112px; flex: none; border-radius: 3px; display: block; }
ol { list-style: none; margin: 0; padding: 0; font-size: .8rem; line-height: 1.1rem; }
li { position: relative; } ol li { display: flex; gap: .5rem; padding: 0 .25rem; }
ol b { flex: 1; font-weight: 400; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
ol span { position: absolute; inset: 1px auto 1px 0; background: var(--bar); z-index: -1; }
ol .right span { background: var(--right); } ol .right b { font-weight: 600; } ol i { font-style: normal; }
.neighbours { width: auto; } .neighbours td { vertical-align: top; padding: .25rem; border: 0; }
.neighbours td:first-child { padding-right: 1rem; } .neighbours .thumbnail { width: 96px; height: 96px; }
.neighbours small { display: block; width: 96px; overflow: hidden; text-overflow: ellipsis; color: var(--quiet); }
.neighbours .right small { color: var(--green); font-weight: 600; }
"""


def table(rows: list[tuple[str, str]]) -> str:
    """Names and values."""
    cells = "".join(f'<tr><th>{html.escape(k)}</th><td class="text">{html.escape(v)}</td></tr>' for k, v in rows)
    return f"<table>{cells}</table>"


def epochs_table(history: list[dict[str, Any]]) -> str:
    """One row an epoch, as the history has it."""
    heads = ("epoch", "train loss", "train error", "val loss", "top-1", "top-5", "rate", "seconds")
    lines = []
    for row in history:
        cells = (
            str(row["epoch"]),
            f"{row['train_loss']:.3f}",
            f"{row['train_error']:.1%}",
            f"{row['val_loss']:.3f}",
            f"{row['top1_error']:.1%}",
            f"{row['top5_error']:.1%}",
            f"{row['lr']:g}",
            f"{row['seconds']:.0f}",
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
