"""What a report is made of: blocks that Markdown (here) and HTML (probes/page.py) draw alike."""

import dataclasses
import html
import re
from collections.abc import Sequence

from probes.matrix import picture


@dataclasses.dataclass(frozen=True)
class Heading:
    """level: 1 for the title, 2 for a section."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Item:
    """tag: a word or two that the rest is known by. lines: what is to be said of it, the first one being its text."""

    tag: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Items:
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """caption: what it shows. head, rows: the first column names the row, and the others hold numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """stem: of the files STEM.svg, STEM-dark.svg and the same as PNG. alt: for who cannot see it. caption: below it."""

    stem: str
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines as they are; under a summary that opens, if there is one."""

    lines: tuple[str, ...]
    summary: str = ""


Block = Heading | Paragraph | Items | Table | Picture | Code


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as a page of GitHub's Markdown."""
    return "\n\n".join("\n".join(_lines(block)) for block in blocks) + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Heading():
            return [f"{'#' * block.level} {plain(block.text)}"]
        case Paragraph():
            return [plain(block.text)]
        case Items():
            return [_item(item) for item in block.items]
        case Table():
            rows = [f"| {' | '.join(map(plain, row))} |" for row in (block.head, *block.rows)]
            rule = "|---|" + "---:|" * (len(block.head) - 1)
            return [plain(block.caption), "", rows[0], rule, *rows[1:]]
        case Picture():
            return [picture(block.stem, html.escape(block.alt)), "", plain(block.caption)]
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", "\n".join(block.lines))), default=0))
            lines = [fence, *block.lines, fence]
            if not block.summary:
                return lines
            return [f"<details><summary>{html.escape(block.summary)}</summary>", "", *lines, "", "</details>"]


def _item(item: Item) -> str:
    said, *more = map(plain, item.lines)
    return "  \n  ".join([f"- **{plain(item.tag)}**: {said}", *more])


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*|\[\]~])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is only a line
    return re.sub(r"^(\d*)([#+.)-]+ )", r"\1\\\2", text)  # at the start it would be a heading, or a list
