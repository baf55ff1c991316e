"""Pictures that compare models however many there are: numbers in cells.

Each is drawn for a light page and for a dark one (NAME-dark), as PNG and as SVG.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from probes.figures import STYLE

DARK: Any = {
    "text.color": "#e6e6e6",
    "axes.labelcolor": "#e6e6e6",
    "axes.edgecolor": "#9a9a9a",
    "axes.facecolor": "#0d1117",
    "figure.facecolor": "#0d1117",
    "savefig.facecolor": "#0d1117",
    "xtick.color": "#e6e6e6",
    "ytick.color": "#e6e6e6",
    "grid.color": "#30363d",
}
WIDEST = 26  # columns beside each other
Draw = Callable[[bool], Figure]  # dark -> the picture


def both(draw: Draw, path: Path) -> None:
    """PATH.png, PATH.svg, PATH-dark.png, PATH-dark.svg."""
    for dark, name in ((False, path.name), (True, f"{path.name}-dark")):
        with _style(dark):
            figure = draw(dark)
            figure.savefig(path.with_name(f"{name}.png"), dpi=110)
            figure.savefig(path.with_name(f"{name}.svg"), metadata={"Date": None})


@contextmanager
def _style(dark: bool) -> Iterator[None]:
    with matplotlib.rc_context({**STYLE, **(DARK if dark else {}), "axes.titlepad": 10}):
        yield


def picture(name: str, alt: str) -> str:
    """Markdown that shows a picture in the page's own mood."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.png">'
        f'<img alt="{alt}" src="{name}.png"></picture>'
    )


Cell = tuple[float, float] | None  # mean over seeds, and half of the range between the least and the most


def matrix(
    title: str,
    panels: Mapping[str, Sequence[str]],
    values: Mapping[str, Mapping[str, Sequence[Cell]]],
    guides: Mapping[str, Sequence[Cell]] | None = None,
) -> Draw:
    """A picture of accuracies in cells: `values` by model and panel, a cell for each column that `panels` names.

    guides: by panel, what guessing reaches, as a last row. None: not asked.
    """
    models = list(values)
    names = [*models, "guessing"] if guides else models

    def draw(dark: bool) -> Figure:
        widths = [max(1, len(columns)) for columns in panels.values()]
        longest = max((len(c) for columns in panels.values() for c in columns), default=1)
        every = [cell for row in values.values() for panel in row.values() for cell in panel if cell is not None]
        width = 0.56 if all(spread < 0.005 for _, spread in every) else 0.7
        stacked = sum(widths) > WIDEST  # panels below each other
        across = max(widths) if stacked else sum(widths)
        down = (len(panels) if stacked else 1) * (0.7 + 0.09 * longest + 0.27 * len(names))
        shape = (len(panels), 1) if stacked else (1, len(panels))
        figure = Figure(figsize=(2.2 + width * across + 0.25 * shape[1], 0.4 + down), layout="constrained")
        ratios = None if stacked else widths
        grid = figure.subplots(*shape, squeeze=False, gridspec_kw={"width_ratios": ratios}).ravel()
        colours = matplotlib.colormaps["cividis"]
        for number, (axes, (panel, columns)) in enumerate(zip(grid, panels.items(), strict=True)):
            rows = [list(values[model][panel]) for model in models] + ([list(guides[panel])] if guides else [])
            table = np.array([[math.nan if cell is None else cell[0] for cell in row] for row in rows], float)
            axes.imshow(table, cmap=colours, vmin=0, vmax=1, aspect="auto")
            for r, row in enumerate(rows):
                for c, cell in enumerate(row):
                    if cell is not None:
                        shade = "#000000" if cell[0] > 0.55 else "#ffffff"
                        axes.text(c, r, _said(*cell), ha="center", va="center", fontsize=7.5, color=shade)
            axes.set_xticks(range(len(columns)), columns, rotation=90 if longest > 5 else 0, fontsize=7.5)
            axes.set_yticks(range(len(names)), names if stacked or number == 0 else [""] * len(names), fontsize=8)
            axes.tick_params(length=0)
            axes.grid(False)
            axes.set_xlabel(panel, fontsize=8.5)
            for side in axes.spines.values():
                side.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure

    return draw


def _said(mean: float, spread: float) -> str:
    return _short(mean) if spread < 0.005 else f"{_short(mean)} ±{_short(spread)}"


def _short(x: float) -> str:
    """Two digits, and 1 only for all: .99 is not everything."""
    return "1" if x == 1 else f"{min(x, 0.994):.2f}"[1:] if x < 1 else f"{x:.2f}"


def cells(seeds: Sequence[Sequence[float | None]]) -> list[Cell]:
    """Cells of lists of numbers, a list for each seed; None where no seed has a number."""
    out: list[Cell] = []
    for column in zip(*seeds, strict=True):
        known = [x for x in column if x is not None]
        out.append((float(np.mean(known)), (max(known) - min(known)) / 2) if known else None)
    return out
