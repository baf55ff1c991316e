"""Pictures of what probes find, as PNG and SVG: no reader needs colour alone, or a legend, to tell two models apart."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probes.evaluation import Score
from probes.repetition import Reading

# Okabe & Ito (2008): eight hues that colour-blind readers can tell apart. Yellow is left out: too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
INK, FAINT = "#222222", "#767676"

STYLE: Any = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 20,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "recall",  # the same picture is the same file
}


def recall_curve(
    models: Mapping[str, Sequence[Score]], path: str | pathlib.Path, title: str = "Recall"
) -> tuple[pathlib.Path, pathlib.Path]:
    """Accuracy by slice of one model or several, with standard errors, the plateau of guesses and chance.

    Writes path.png and path.svg (a suffix of `path` is dropped) and returns both. A model may lack some slices.
    """
    slices = {_key(s): s for scores in models.values() for s in scores}
    place = {key: x for x, key in enumerate(slices)}
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(title, 2.9 + 0.75 * max(3, len(slices)))
        ends = []
        for number, (name, scores) in enumerate(models.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            xs, ys = [place[_key(s)] for s in scores], [s.accuracy for s in scores]
            axes.errorbar(
                xs, ys, [np.nan_to_num(s.standard_error) for s in scores], color=colour, marker=marker,
                markeredgecolor="white", capsize=2, elinewidth=1, clip_on=False, zorder=3,
            )  # fmt: skip
            ends.append((max(zip(xs, ys, strict=True)), name, colour))
        for x, s in enumerate(slices.values()):
            _guide(axes, s.plateau or s.chance, s.chance, (x - 0.3, x + 0.3))
        _name_guides(axes)
        _name_ends(axes, ends)
        axes.set_xticks(range(len(slices)), ["\n".join(map(str, reversed(key))) for key in place])
        axes.set_xlim(-0.35, len(slices) - 0.65)
        axes.set_xlabel(" over ".join(reversed(next(iter(slices.values())).slice)))
        return _save(figure, path)


def _key(score: Score) -> tuple[Any, ...]:
    return tuple(score.slice.values())


def learning_curve(
    models: Mapping[str, Sequence[tuple[int, float]]],
    path: str | pathlib.Path,
    *,
    pairs: int,
    vocab: int,
    title: str = "Learning to recall",
    goal: float | None = 0.99,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Accuracy against training steps, (step, accuracy) points a model, with the step that first reaches `goal`.

    Writes path.png and path.svg (a suffix of `path` is dropped) and returns both.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(title, 6.4)
        ends, last = [], max(step for points in models.values() for step, _ in points)
        for number, (name, points) in enumerate(models.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            xs, ys = [step for step, _ in points], [accuracy for _, accuracy in points]
            axes.plot(xs, ys, color=colour, clip_on=False, zorder=3)
            reached = next((p for p in points if goal is not None and p[1] >= goal), None)
            if reached:
                axes.plot(
                    *reached,
                    color=colour,
                    marker=marker,
                    markersize=7,
                    markeredgecolor="white",
                    zorder=4,
                    clip_on=False,
                )
            ends.append(((xs[-1], ys[-1]), f"{name}, {reached[0]:,} steps" if reached else name, colour))
        _guide(axes, 1 / pairs, 2 / vocab, (0, last))
        _name_guides(axes)
        _name_ends(axes, ends)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("training step" + (f" (marked: the first to reach {goal:.0%})" if goal is not None else ""))
        return _save(figure, path)


def repetition_curve(
    readings: Sequence[Reading], path: str | pathlib.Path, title: str = "Text read twice"
) -> tuple[pathlib.Path, pathlib.Path]:
    """Accuracy at the first and second reading of a passage, by its length; writes path.png and path.svg."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _canvas(title, 6.4)
        xs = [r.distance for r in readings]
        second, first = [r.second for r in readings], [r.first for r in readings]
        axes.errorbar(
            xs, second, [r.standard_error for r in readings], color=COLOURS[0], marker=MARKERS[0],
            markeredgecolor="white", capsize=2, elinewidth=1, clip_on=False, zorder=3,
        )  # fmt: skip
        axes.plot(xs, first, color=COLOURS[1], marker=MARKERS[1], markeredgecolor="white", clip_on=False, zorder=3)
        axes.fill_between(xs, first, second, color=COLOURS[0], alpha=0.08, linewidth=0)
        lines = (("second reading", second), ("first reading", first))
        _name_ends(axes, [((xs[-1], ys[-1]), name, COLOURS[n]) for n, (name, ys) in enumerate(lines)])
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.minorticks_off()
        axes.set_xlim(xs[0], xs[-1])
        axes.set_xlabel("tokens between a token and its repetition")
        return _save(figure, path)


def _canvas(title: str, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.tick_params(length=3, color=FAINT)
    return figure, axes


GUIDES = {"some answer of the row's kind": (0, (4, 2)), "chance": (0, (1, 1.5))}


def _guide(axes: Axes, plateau: float, chance: float, span: tuple[float, float]) -> None:
    """What guessing reaches, over a span of x: some value of the row (dashed), any value (dotted)."""
    for y, dashes in zip((plateau, chance), GUIDES.values(), strict=True):
        axes.plot(span, [y, y], color=FAINT, linestyle=dashes, linewidth=1.2, zorder=2, clip_on=False)


def _name_guides(axes: Axes) -> None:
    """Names the two guides in a line under the title."""
    lines = [Line2D([], [], color=FAINT, linestyle=dashes, linewidth=1.2) for dashes in GUIDES.values()]
    axes.legend(
        lines, GUIDES, loc="lower left", bbox_to_anchor=(-0.01, 1.015), ncols=2, frameon=False, fontsize=8,
        labelcolor=FAINT, handlelength=2.2, columnspacing=1.6, borderaxespad=0, borderpad=0,
    )  # fmt: skip


def _name_ends(axes: Axes, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Writes each name beside the last point of its line; names that would overlap are moved apart."""
    heights = apart([y for (_, y), _, _ in ends], least=0.062, low=0.0, high=1.0)
    for ((x, y), name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, xy=(x, y), xytext=(1.02, height), textcoords=axes.get_yaxis_transform(), color=colour, va="center",
            fontsize=9, annotation_clip=False, in_layout=True,
        )  # fmt: skip


def apart(wanted: Sequence[float], *, least: float, low: float, high: float) -> list[float]:
    """Heights as near to the wanted ones as a gap of `least` between any two allows, in their order."""
    order = np.argsort(np.array(wanted), kind="stable")
    least = min(least, (high - low) / max(1, len(wanted) - 1))
    heights = np.array(wanted)[order]
    for i in range(1, len(heights)):  # push up from below, then back down from the top
        heights[i] = max(heights[i], heights[i - 1] + least)
    heights[-1] = min(heights[-1], high)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = max(min(heights[i], heights[i + 1] - least), low + i * least)
    out = np.empty(len(heights))
    out[order] = heights
    return out.tolist()


def _save(figure: Figure, path: str | pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    path = pathlib.Path(path)
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(png, dpi=200)
    figure.savefig(svg, metadata={"Date": None})
    return png, svg
