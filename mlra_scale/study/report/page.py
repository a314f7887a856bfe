"""The HTML page: one file with its style and images inside, which asks for nothing and runs no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 48rem; }
p.lead { font-size: 1.05rem; }
p.small, figcaption, details { font-size: .88rem; color: #444; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #e2e2e2;
  min-width: 3.2rem; }
thead th { border-bottom: 1px solid #888; }
td.number, th.number { text-align: right; }
td.number, td.whole { white-space: nowrap; }
td { max-width: 26rem; }
figure { margin: .8rem 0 1.2rem; }
figcaption { max-width: 48rem; }
img { display: block; width: 100%; height: auto; }
pre { overflow-x: auto; font-size: .78rem; background: #f5f5f5; padding: .6rem; }
summary { cursor: pointer; }
@media print { details { display: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """Returns a value as text of the page."""
    return html.escape(str(value))


def paragraph(content: object, css: str = "") -> str:
    """Returns a paragraph of plain text."""
    return f"<p{_css(css)}>{text(content)}</p>"


def heading(content: object) -> str:
    """Returns the heading of a part of a section."""
    return f"<h3>{text(content)}</h3>"


def items(lines: Sequence[object]) -> str:
    """Returns a list of plain lines; nothing without lines."""
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>" if lines else ""


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = (), whole: Sequence[int] = ()
) -> str:
    """Returns a table.

    Args:
        head: The columns' names.
        rows: The cells.
        numbers: Columns that are set to the right.
        whole: Columns whose text stays on one line.
    """
    css = {**dict.fromkeys(whole, "whole"), **dict.fromkeys(numbers, "number")}

    def cells(tag: str, values: Sequence[object]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{_css(css.get(index, ''))}>{text(value)}</{tag}>" for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def without_repeats(rows: Sequence[Sequence[object]]) -> list[Sequence[object]]:
    """Returns rows whose first cell is empty where it says what the one above says."""
    above = [None, *(row[0] for row in rows[:-1])]
    return [("", *row[1:]) if row[0] == last else row for row, last in zip(rows, above, strict=True)]


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """Returns a table of names and values; values that are None are left out."""
    body = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(v)}</td></tr>' for name, v in rows if v is not None)
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def image(png: bytes, alternative: str, caption: str) -> str:
    """Returns a figure with the image inside the page.

    Args:
        png: The image.
        alternative: What it shows, for those who do not see it.
        caption: How it is to be read.
    """
    data = base64.b64encode(png).decode("ascii")
    # The size stands in the file's header; a page that knows it does not jump while it loads.
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    source = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{text(alternative)}">'
    return f"<figure>{source}<figcaption>{text(caption)}</figcaption></figure>"


def folded(summary: str, *parts: str) -> str:
    """Returns what is shown on request only."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def preformatted(content: str) -> str:
    """Returns text as it is."""
    return f"<pre>{text(content)}</pre>"


def section(title: str, *parts: str) -> str:
    """Returns a section; parts that are empty leave no trace."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def page(title: str, *parts: str) -> str:
    """Returns the whole document.

    Args:
        title: Its title.
        parts: The sections.
    """
    # The policy keeps the promise: nothing is fetched, nothing is run.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{text(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style>'
    )
    body = f"<h1>{text(title)}</h1>{''.join(parts)}"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _css(name: str) -> str:
    return f' class="{name}"' if name else ""
