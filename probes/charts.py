"""Pictures of many things, told apart without colour: rows of points, lines, small panels, numbers in cells.

Each returns what probes.matrix.both draws, light and dark.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from probes.figures import COLOURS, FAINT, INK, MARKERS, apart
from probes.matrix import DARK, Draw

WIDTH = 5.3  # inches: what a phone can show whole
SMALL = 8.0  # points of text
DOTS = (0, (1, 1.6))
LEADER: dict[str, Any] = {"arrowstyle": "-", "lw": 0.8, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}


@dataclasses.dataclass(frozen=True)
class At:
    """A mean over seeds, and the least and the most of them, at an x."""

    x: float
    mean: float
    low: float
    high: float


def look(number: int) -> tuple[str, str]:
    """A colour and a marker: a pair comes again after 42."""
    return COLOURS[number % (len(COLOURS) - 1)], MARKERS[number % len(MARKERS)]


def inks(dark: bool) -> tuple[str, str]:
    """Of text, and of what is less than that."""
    return (DARK["text.color"], DARK["axes.edgecolor"]) if dark else (INK, FAINT)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches that lays itself out."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def limits(axes: Axes, values: Sequence[float], share: bool) -> None:
    """share: values are between 0 and 1, and the axis shows all of it where they reach beyond the half."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    if share:
        axes.set_ylim(-0.02 if high > 0.5 else -0.03 * max(high, 0.02), 1.03 if high > 0.5 else 1.2 * max(high, 0.02))
    else:
        margin = 0.08 * (high - low or abs(high) or 1)
        axes.set_ylim(low - margin, high + margin)


def points(title: str, rows: Mapping[str, At], label: str, guess: float | None) -> Draw:
    """A line for each row from above to below: its mean, and the least and the most."""

    def draw(dark: bool) -> Figure:
        ink, faint = inks(dark)
        figure, axes = canvas(WIDTH, 1.1 + 0.21 * len(rows))
        for y, at in enumerate(rows.values()):
            axes.plot([at.low, at.high], [y, y], color=COLOURS[0], lw=3, alpha=0.45, solid_capstyle="round")
            axes.plot([at.mean], [y], color=COLOURS[0], marker="o", ms=6)
            axes.annotate(
                f"{at.mean:.3f}", (1.01, y), xycoords=axes.get_yaxis_transform(), va="center", fontsize=SMALL, color=ink
            )
        if guess is not None:
            axes.axvline(guess, ls=DOTS, lw=1.3, color=faint)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=SMALL + 0.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure

    return draw


@dataclasses.dataclass(frozen=True)
class X:
    """The horizontal axis. ticks: (place, name) of what is there; none for those that matplotlib finds. log: of it."""

    label: str
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False


def lines(
    title: str,
    series: Mapping[str, Sequence[At]],
    x: X,
    label: str,
    *,
    share: bool,
    guesses: Sequence[tuple[float, float]] = (),
    marked: bool = True,
) -> Draw:
    """A line for each of a few, its band from least to most, its name beside its end. guesses: (x, y) of guessing."""

    def draw(dark: bool) -> Figure:
        ink, faint = inks(dark)
        longest = max(map(len, series))
        high = max(3.6, 1.3 + 0.17 * len(series))
        figure, axes = canvas(max(WIDTH, 3.7 + 0.07 * longest), high)
        every = [y for line in series.values() for at in line for y in (at.low, at.high)] + [y for _, y in guesses]
        limits(axes, every, share)
        if x.log:
            axes.set_xscale("log")
        for number, line in enumerate(series.values()):
            colour, marker = look(number)
            xs = [at.x for at in line]
            axes.plot(xs, [at.mean for at in line], color=colour, marker=marker if marked else "", zorder=3)
            axes.fill_between(xs, [a.low for a in line], [a.high for a in line], color=colour, alpha=0.16, lw=0)
        if guesses:
            span = list(guesses) if len(guesses) > 1 else [(axes.get_xlim()[side], guesses[0][1]) for side in (0, 1)]
            axes.plot(*zip(*span, strict=True), color=faint, ls=DOTS, lw=1.3, marker="", zorder=2, scalex=False)
        name_ends(axes, {name: (line[-1].x, line[-1].mean) for name, line in series.items()}, high - 1.0, ink)
        if x.ticks:
            names = [name for _, name in x.ticks]
            tilted = len(names) > 1 and sum(map(len, names)) > 44
            axes.set_xticks([at for at, _ in x.ticks], names, rotation=90 if tilted else 0)
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(x.label)
        axes.set_ylabel(label)
        axes.set_title(title)
        return figure

    return draw


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], height: float, ink: str) -> None:
    """Writes names right of the axes, `height` inches high, each with a line to where it ends."""
    low, top = axes.get_ylim()
    heights = _heights([(y - low) / (top - low) for _, y in ends.values()], 0.155 / height)
    for number, (name, end) in enumerate(ends.items()):
        axes.annotate(
            name, end, (1.05, heights[number]), textcoords="axes fraction", va="center", fontsize=SMALL, color=ink,
            annotation_clip=False, arrowprops={**LEADER, "color": look(number)[0]},
        )  # fmt: skip


def _heights(ends: Sequence[float], least: float) -> list[float]:
    """Of names beside the ends of lines: moved apart upwards and downwards alike."""
    told = [end + 1e-6 * number for number, end in enumerate(ends)]  # no two alike: both ways have one order
    up = apart(told, least=least, low=0.0, high=1.0)
    down = apart([1 - end for end in told], least=least, low=0.0, high=1.0)
    return [(above + 1 - below) / 2 for above, below in zip(up, down, strict=True)]


def panels(title: str, series: Mapping[str, Sequence[At]], x: str, label: str, *, share: bool) -> Draw:
    """The same for many: a panel each; in grey, what lies between the least and the most of all."""

    def draw(dark: bool) -> Figure:
        ink, faint = inks(dark)
        down = math.ceil(len(series) / 3)
        figure = Figure(figsize=(WIDTH, 0.7 + 1.18 * down), layout="constrained")
        grid = figure.subplots(down, 3, sharex=True, sharey=True, squeeze=False).ravel()
        every = [y for line in series.values() for at in line for y in (at.low, at.high)]
        limits(grid[0], every, share)
        span = sorted({at.x for line in series.values() for at in line})
        sofar = [[at.mean for line in series.values() for at in _last(line, x)] for x in span]
        lows, highs = list(map(min, sofar)), list(map(max, sofar))
        for axes, (name, line) in zip(grid, series.items(), strict=False):
            axes.fill_between(span, lows, highs, color=faint, alpha=0.18, lw=0)
            xs = [at.x for at in line]
            axes.fill_between(xs, [a.low for a in line], [a.high for a in line], color=COLOURS[0], alpha=0.25, lw=0)
            axes.plot(xs, [at.mean for at in line], color=COLOURS[1] if dark else COLOURS[0], lw=1.8, zorder=3)
            axes.set_title(_folded(name, 22), fontsize=SMALL - 0.5, fontweight="normal", pad=3, color=ink)
            axes.tick_params(labelsize=7)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for number, axes in enumerate(grid):
            axes.set_visible(number < len(series))
            axes.xaxis.set_tick_params(labelbottom=number + 3 >= len(series))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        figure.supxlabel(x, fontsize=8.5)
        figure.supylabel(label, fontsize=8.5)
        return figure

    return draw


def _last(line: Sequence[At], x: float) -> list[At]:
    """The last place up to x, if there is one."""
    return [at for at in line if at.x <= x][-1:]


def _folded(name: str, width: int) -> str:
    """On lines of about so many letters, broken after commas where there are some."""
    lines = [""]
    for word in name.replace(", ", ",\n").replace(" ", "\n").split("\n"):
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)


def heat(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], marks: Sequence[int],
    label: str, *, share: bool, higher: bool,
) -> Draw:  # fmt: skip
    """Numbers in cells, with a frame around one of each row. marks: which. None: not known."""

    def draw(dark: bool) -> Figure:
        table = np.array([[math.nan if x is None else x for x in row] for row in rows.values()], float)
        known = table[np.isfinite(table)]
        low, high = (0.0, 1.0) if share else (known.min(), known.max()) if len(known) else (0.0, 1.0)
        tilted = max(map(len, columns)) > 7
        height = 1.0 + 0.25 * len(rows) + (0.075 * max(map(len, columns)) if tilted else 0.1)
        longest = max(map(len, rows))
        figure, axes = canvas(max(3.6, 0.6 + 0.072 * longest + 0.62 * len(columns)), height)
        colours = matplotlib.colormaps["cividis" if higher else "cividis_r"]
        axes.imshow(table, cmap=colours, vmin=low, vmax=high if high > low else low + 1, aspect="auto")
        for r, row in enumerate(rows.values()):
            for c, value in enumerate(row):
                if value is None:
                    continue
                part = (value - low) / (high - low) if high > low else 0.0
                shade = "#000000" if (part if higher else 1 - part) > 0.55 else "#ffffff"
                weight = "bold" if c == marks[r] else "normal"
                axes.text(c, r, f"{value:.3f}", ha="center", va="center", fontsize=SMALL, color=shade, weight=weight)
            if marks[r] >= 0:
                frame = Rectangle((marks[r] - 0.47, r - 0.45), 0.94, 0.9, fill=False, ec=COLOURS[1], lw=2)
                axes.add_patch(frame)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if tilted else 0, fontsize=SMALL)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=SMALL)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_xlabel(label, fontsize=8.5)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure

    return draw
