"""A report as one HTML file: nothing is fetched and no script runs, on a phone, a screen or paper, light or dark."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from probes.blocks import Block, Code, Heading, Item, Items, Paragraph, Picture, Table

COMFORT = 520  # CSS pixels: pictures up to this width fit a phone; wider ones scroll there
SMALLEST = {True: 0.7, False: 0.85}  # the share of its size to which a picture shrinks, if it is narrow or wide

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2125; --soft: #59636e; --line: #d5dade; --tint: #f4f6f8;
  --link: #0b5cad; --good: #00694d; --bad: #a93f00; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6e6e6; --soft: #a3acb6;
  --line: #30363d; --tint: #161b22; --link: #6cb4f5; --good: #4fc79b; --bad: #f39a5f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
body > * { max-width: 60rem; margin-inline: auto; padding-inline: 1rem; }
main p, main ul, header p { max-width: 44rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 0.25rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.25rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
header p { font-size: 1.1rem; color: var(--soft); margin: 0 0 1rem; }
a { color: var(--link); }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem;
  font-size: 0.95rem; }
nav a { display: inline-block; padding: 0.25rem 0; }
ul.items { list-style: none; padding: 0; margin: 0; }
ul.items li { padding: 0.6rem 0 0.6rem 0.8rem; border-left: 3px solid var(--line); margin-bottom: 0.75rem; }
ul.items li.seen { border-color: var(--good); } ul.items li.the-opposite { border-color: var(--bad); }
ul.items strong { display: block; font-size: 0.85rem; letter-spacing: 0.02em; color: var(--soft); }
ul.items .seen strong { color: var(--good); } ul.items .the-opposite strong { color: var(--bad); }
ul.items span { display: block; } ul.items span + span { color: var(--soft); font-size: 0.92rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.caption { margin: 0 0 0.4rem; color: var(--soft); font-size: 0.92rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; min-width: 5.2rem; line-height: 1.25;
  border-bottom: 2px solid var(--soft); }
th:first-child { position: sticky; left: 0; text-align: left; background: var(--page); min-width: 10rem;
  max-width: 16rem; white-space: normal; font-weight: 600; border-right: 1px solid var(--line); }
tbody tr:nth-child(even) > * { background: var(--tint); }
figure { margin: 1.25rem 0 0.5rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.4rem; color: var(--soft); font-size: 0.92rem; max-width: 44rem; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 4px; padding: 0.6rem 0.8rem;
  overflow-x: auto; font: 0.82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; padding: 0.4rem 0; }
footer { height: 2.5rem; }
@media (max-width: 40rem) { th:first-child { min-width: 7rem; max-width: 9rem; } th, td { padding: 0.35rem 0.5rem; } }
@media print {
  @page { margin: 1.6cm; }
  html { font-size: 10pt; } body > * { max-width: none; padding: 0; } nav { display: none; }
  h2 { break-after: avoid; } figure, li, tr { break-inside: avoid; }
  .scroll { overflow: visible; } figure img { min-width: 0 !important; max-width: 100% !important; }
  table { font-size: 6pt; width: 100%; }
  th, td, thead th, th:first-child { padding: 0.1rem 0.15rem; white-space: normal; min-width: 0; }
  pre { white-space: pre-wrap; } th:first-child { position: static; }
}
"""


def page(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as a page; pictures are taken from the folder, and are part of it. The first block is the title."""
    title, question, *rest = blocks
    assert isinstance(title, Heading) and isinstance(question, Paragraph)
    sections = [block for block in rest if isinstance(block, Heading)]
    links = "".join(f'<li><a href="#{_anchor(block)}">{_text(block.text)}</a></li>' for block in sections)
    body: list[str] = []
    for block in rest:
        if isinstance(block, Heading) and any(isinstance(b, Heading) for b in rest[: rest.index(block)]):
            body.append("</section>")
        body.append(_drawn(block, folder))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title.text)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<header>\n<h1>{_text(title.text)}</h1>\n<p>{_text(question.text)}</p>\n</header>",
            f'<nav aria-label="Contents">\n<ul>{links}</ul>\n</nav>' if links else "",
            "<main>",
            *body,
            "</section>" if sections else "",
            "</main>\n<footer></footer>\n</body>\n</html>\n",
        ]
    )


def _text(text: str) -> str:
    return html.escape(text)


def _anchor(heading: Heading) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.text.lower()).strip("-")


def _drawn(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            anchor = _anchor(block)
            head = f"h{block.level}"
            return f'<section aria-labelledby="{anchor}">\n<{head} id="{anchor}">{_text(block.text)}</{head}>'
        case Paragraph():
            return f"<p>{_text(block.text)}</p>"
        case Items():
            return f'<ul class="items">{"".join(map(_item, block.items))}</ul>'
        case Table():
            return _table(block)
        case Picture():
            return _picture(block, folder)
        case Code():
            lines = f"<pre><code>{_text(chr(10).join(block.lines))}</code></pre>"
            return f"<details><summary>{_text(block.summary)}</summary>{lines}</details>" if block.summary else lines


def _item(item: Item) -> str:
    lines = "".join(f"<span>{_text(line)}</span>" for line in item.lines)
    return f'<li class="{item.tag.replace(" ", "-")}"><strong>{_text(item.tag)}</strong>{lines}</li>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in table.rows
    )
    return (
        f'<p class="caption">{_text(table.caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.caption)}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>"
    )


def _picture(picture: Picture, folder: Path) -> str:
    light, dark = ((folder / f"{picture.stem}{mood}.svg").read_text() for mood in ("", "-dark"))
    points = re.search(r'<svg[^>]*\swidth="([\d.]+)pt"', light)
    width = round(float(points[1]) * 4 / 3) if points else COMFORT
    least = round(width * SMALLEST[width <= COMFORT])
    return (
        f'<figure>\n<div class="scroll" tabindex="0"><picture>'
        f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_inside(dark)}">'
        f'<img alt="{_text(picture.alt)}" src="{_inside(light)}" style="max-width: {width}px; min-width: {least}px">'
        f"</picture></div>\n<figcaption>{_text(picture.caption)}</figcaption>\n</figure>"
    )


def _inside(svg: str) -> str:
    """A picture as an address that holds it: its names cannot meet those of another."""
    svg = re.sub(r"<!DOCTYPE.*?>|<metadata>.*?</metadata>|<\?xml.*?\?>", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg).strip()
    svg = re.sub(r'(?<=\sd=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
