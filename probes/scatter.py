"""Points by size, on a scale of powers, whose labels never overlap: those that have no room get numbers and a key."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import LogLocator, SymmetricalLogLocator
from matplotlib.transforms import Bbox

from probes.charts import DOTS, SMALL, WIDTH, At, canvas, inks, limits, look, name_ends
from probes.figures import FAINT
from probes.matrix import Draw

NAMED = 14  # points that may have their names beside them


def scatter(
    title: str,
    series: Mapping[str, Sequence[At]],
    hollow: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    label: str,
    *,
    share: bool,
    guess: float | None,
) -> Draw:
    """Points by x, on a scale of powers; those of a series are joined. hollow: others, by name, likewise.

    Where series are lines, names stand right of all. Else they stand beside their points; where there is no room for
    all names, numbers do, and a key has the names.
    """

    joined = any(len(line) > 1 for line in series.values())

    def draw(dark: bool) -> Figure:
        if joined or len(series) + len(hollow) <= NAMED:
            figure, fits = _scattered(dark, False)
            if fits or joined:
                return figure
        return _scattered(dark, True)[0]

    def _scattered(dark: bool, numbered: bool) -> tuple[Figure, bool]:
        ink, faint = inks(dark)
        names = [*series, *hollow]
        columns = 2 if max(map(len, names)) < 36 else 1
        key = 0.18 * math.ceil(len(names) / columns) if numbered else 0.0
        width = max(WIDTH, 3.7 + 0.07 * max(map(len, series))) if joined else WIDTH
        high = max(3.9, 1.1 + 0.17 * len(series)) if joined else 3.9 + key
        figure, axes = canvas(width, high)
        every = [at for line in series.values() for at in line]
        others = [point for points in hollow.values() for point in points]
        ys = [y for at in every for y in (at.low, at.high)] + [y for _, y in others]
        limits(axes, [*ys, *([] if guess is None else [guess])], share)
        sizes = [at.x for at in every] + [size for size, _ in others]
        _powers(axes, sizes)
        wanted, handles = [], []
        for number, (name, line) in enumerate(series.items()):
            colour, marker = look(number)
            means = [at.mean for at in line]
            ranges = [[at.mean - at.low for at in line], [at.high - at.mean for at in line]]
            axes.errorbar(
                [at.x for at in line], means, ranges, color=colour, marker=marker, ms=6, lw=1.2, elinewidth=1.2,
                capsize=2, zorder=3,
            )  # fmt: skip
            if not joined:
                wanted.append((line[0].x, line[0].mean, str(number + 1) if numbered else name, ink))
            said = f"{number + 1}  {name}"
            handles.append(Line2D([], [], color=colour, marker=marker, ms=5, lw=0, label=said))
        for number, (name, points) in enumerate(hollow.items()):
            axes.plot(
                *zip(*points, strict=True), color=faint, marker="o", mfc="none", ms=6.5, lw=0.8, ls=DOTS, zorder=2
            )
            letter = chr(ord("a") + number % 26)
            wanted.append((*points[-1], letter if numbered else name, faint))
            handles.append(Line2D([], [], color=faint, marker="o", mfc="none", ms=5, lw=0, label=f"{letter}  {name}"))
        if guess is not None:
            axes.axhline(guess, ls=DOTS, lw=1.3, color=faint)
        axes.set_xlabel(x)
        axes.set_ylabel(label)
        axes.set_title(title)
        if numbered:
            figure.legend(
                handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=SMALL - 0.5,
                handlelength=1, labelspacing=0.25, columnspacing=1.2, labelcolor=ink,
            )  # fmt: skip
        if joined:
            name_ends(axes, {name: (line[-1].x, line[-1].mean) for name, line in series.items()}, high - 1.0, ink)
        dots = [(at.x, at.mean) for at in every] + others
        return figure, _labelled(figure, axes, wanted, dots)

    return draw


def _powers(axes: Axes, sizes: Sequence[float]) -> None:
    least = min((size for size in sizes if size > 0), default=1.0)
    most = max(*sizes, least)
    if min(sizes) > 0:
        axes.set_xscale("log")
        axes.set_xlim(least / (most / least) ** 0.06 / 1.3, most * (most / least) ** 0.06 * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 30 else (1,)))
    else:  # a cell without state has a place too
        axes.set_xscale("symlog", linthresh=least)
        axes.set_xlim(-0.2 * least, most * 2)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=least))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: _size(value))


def _size(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g}"


Wanted = tuple[float, float, str, str]  # a place, what is to stand beside it, and in which colour
SIDES = ((1, 0), (1, 0.7), (1, -0.7), (-1, 0), (0, 1), (0, -1), (-1, 0.7), (-1, -0.7))


def _labelled(figure: Figure, axes: Axes, wanted: Sequence[Wanted], dots: Sequence[tuple[float, float]]) -> bool:
    """Writes each label at the nearest free place, with a line to its point; whether all found one."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # so that it is known where things are
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(np.array(dots, float))]
    inside = axes.get_window_extent()
    fits = True
    for x, y, text, colour in sorted(wanted, key=lambda label: (-label[1], label[0], label[2])):
        label, free = None, False
        for away in (6, 12, 20, 30, 42, 56, 72):
            for right, up in SIDES:
                if label is not None:
                    label.remove()
                label = _beside(axes, (x, y), (right * away, up * away), text, colour)
                label.update_positions(renderer)
                box = Text.get_window_extent(label).padded(1.5)  # without its line
                free = inside.containsx(box.x0) and inside.containsx(box.x1) and inside.y0 < box.y0
                free = free and box.y1 < inside.y1 + 12 and not any(box.overlaps(other) for other in taken)
                if free:
                    break
            if free:
                taken.append(box)
                break
        if label is not None and not free:
            label.remove()
        fits = fits and free
    return fits


def _beside(axes: Axes, at: tuple[float, float], off: tuple[float, float], text: str, colour: str) -> Annotation:
    far = math.hypot(*off) > 16
    label = axes.annotate(
        text, at, off, textcoords="offset points", fontsize=SMALL, color=colour,
        ha="left" if off[0] > 0 else "right" if off[0] < 0 else "center",
        va="bottom" if off[1] > 0 and not off[0] else "top" if off[1] < 0 and not off[0] else "center",
        arrowprops={"arrowstyle": "-", "lw": 0.6, "color": FAINT, "shrinkA": 0, "shrinkB": 3} if far else None,
    )  # fmt: skip
    label.set_in_layout(False)
    return label
