"""Pictures of a run, drawn from its metrics.jsonl: the loss over training, and over the positions of the window."""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from training.log import read

# Okabe and Ito's palette: told apart by the colour-blind, and in print by lightness.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8F98", "#22262B"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",  # a white card, so that it reads on a dark page too
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E9EBEE",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "engrax",  # the same data draw the same file
}


def loss_curve(
    run_folder: Path | str, *, references: Mapping[str, float] | None = None, title: str | None = None
) -> Path:
    """Draws training loss and held-out points over the steps: figures/loss.png, its path returned, and loss.svg.

    references: name to bits per byte, drawn as labelled lines where the run has `bits_per_byte` (they mean nothing to a
        loss in nats per token). title: the folder's name by default.

    A line with `tokens` (seen so far) gives the second axis. Raises ValueError if there are no training lines.
    """
    lines = read(run_folder)
    train = [line for line in lines if line.get("kind") is None and _finite(line.get("loss"))]
    held_out = [line for line in lines if line.get("kind") == "eval"]
    if not train:
        raise ValueError(f"nothing to draw: {run_folder} has no training lines with a finite loss")
    per_byte = all(_finite(line.get("bits_per_byte")) for line in train)
    key = "bits_per_byte" if per_byte else "loss"
    steps, losses = _column(train, "step"), _column(train, key)
    points = [line for line in held_out if _finite(line.get(key))]
    references = dict(references or {}) if per_byte else {}

    from matplotlib.ticker import FixedLocator

    with _figure() as (figure, axes):
        smooth = smoothed(losses)
        axes.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=0.7)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.8)
        labels = [(float(smooth[-1]), "training", BLUE)]
        if points:
            x, y = _column(points, "step"), _column(points, key)
            axes.plot(x, y, color=ORANGE, linewidth=1.0, marker="o", markersize=4.5, markeredgecolor="white")
            labels.append((float(y[-1]), f"held out {y[-1]:.3f}", ORANGE))
        for name, value in references.items():
            axes.axhline(value, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
            labels.append((value, f"{name} {value:.2f}", GREY))
        axes.set_xlim(0, steps[-1] if steps[-1] else 1)
        # The first steps are far above all that follows: the axis begins where the story does, and may cut them off.
        shown = [*smooth[min(len(smooth) // 50, 5) :], *(value for value, *_ in labels)]
        low, high = min(*shown, float(np.quantile(losses, 0.002))), max(shown)
        if low > 0:  # late in a run a small ratio matters as much as a large one early
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(FixedLocator(_ticks(low, high)))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.4g}")
            axes.minorticks_off()
            margin = (high / low) ** 0.06 if high > low else 1.1
            axes.set_ylim(low / margin, high * margin)
        axes.set_xlabel("step")
        axes.set_ylabel("bits per byte" if per_byte else "loss (nats per token)")
        axes.set_title(title or Path(run_folder).absolute().name)
        axes.xaxis.set_major_formatter(lambda x, _: _short(x))
        _label_right(axes, labels)
        if tokens := [line for line in train if _finite(line.get("tokens")) and line["step"] > 0]:
            rate = tokens[-1]["tokens"] / tokens[-1]["step"]
            above = axes.secondary_xaxis("top", functions=(lambda x: x * rate, lambda x: x / rate))
            above.xaxis.set_major_formatter(lambda x, _: _short(x))
            above.set_xlabel("tokens", color=GREY, fontsize=9)
            above.tick_params(labelsize=9, labelcolor=GREY)
            above.spines["top"].set_visible(False)
        return _saved(figure, run_folder, "loss")


def position_curve(run_folder: Path | str, *, title: str | None = None) -> Path:
    """Draws how the held-out loss falls as the context grows: figures/position.png, its path returned, and .svg.

    Reads `nll_by_position` (nats a token at each place of the window; places that ask nothing hold 0) of the
    evaluations: the last in colour, the first and a few between in grey. Bits per byte where the evaluation has
    `bits_per_byte`, by the mean of bytes a token. Raises ValueError if no evaluation has positions.
    """
    evaluations = [line for line in read(run_folder) if line.get("kind") == "eval" and line.get("nll_by_position")]
    if not evaluations:
        raise ValueError(f"nothing to draw: {run_folder} has no evaluation with nll_by_position")
    last = evaluations[-1]
    per_byte = all(_finite(line.get("bits_per_byte")) and line.get("loss") for line in evaluations)
    count = min(len(evaluations), 4)
    chosen = [evaluations[round(i)] for i in np.linspace(0, len(evaluations) - 1, count)]

    with _figure() as (figure, axes):
        labels = []
        for line in chosen:
            scale = line["bits_per_byte"] / line["loss"] if per_byte else 1.0
            x, y = by_context(np.asarray(line["nll_by_position"], float) * scale)
            final = line is last
            axes.plot(x, y, color=BLUE if final else GREY, linewidth=2.0 if final else 1.0, alpha=1 if final else 0.7)
            labels.append((float(y[-1]), f"step {line['step']:,}", BLUE if final else GREY))
        axes.set_xscale("log", base=2 if len(last["nll_by_position"]) <= 4096 else 4)
        axes.set_xlim(1, len(last["nll_by_position"]))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.minorticks_off()
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("held-out bits per byte" if per_byte else "held-out loss (nats per token)")
        axes.set_title(title or Path(run_folder).absolute().name)
        _label_right(axes, labels)
        return _saved(figure, run_folder, "position")


def smoothed(values: np.ndarray, window: float = 0.04) -> np.ndarray:
    """A centred running median and then mean over `window` of the points: a spike does not bend it, nor does it lag."""
    half = max(1, round(len(values) * window / 2)) if len(values) > 8 else 0
    if half == 0:
        return values
    for function in (np.median, np.mean):
        padded = np.pad(values, half, mode="reflect", reflect_type="odd")
        values = function(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=-1)
    return values


def by_context(values: np.ndarray, per_octave: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Means over bins of equal width on a log axis: (tokens of context, value). Values that are 0 are left out."""
    context = np.arange(1, len(values) + 1)
    edges = np.unique(np.round(2 ** (np.arange(0, per_octave * math.log2(len(values) + 1) + 1) / per_octave)))
    edges = np.append(edges[edges <= max(1, 0.9 * len(values))], len(values) + 1)  # no sliver at the end
    bins, asked = np.digitize(context, edges), values != 0
    kept = [b for b in np.unique(bins) if asked[bins == b].any()]
    x = [math.exp(np.log(context[(bins == b) & asked]).mean()) for b in kept]
    return np.array(x), np.array([values[(bins == b) & asked].mean() for b in kept])


@contextmanager
def _figure() -> Iterator[Any]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # no pyplot: nothing global, no display

        figure = Figure(figsize=(8.2, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _saved(figure: Any, run_folder: Path | str, name: str) -> Path:
    path = Path(run_folder) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path


def _label_right(axes: Any, labels: list[tuple[float, str, str]], gap: float = 0.052) -> None:
    """Writes each label beside the right edge at its value, pushed apart where they would overlap."""
    ordered = sorted(labels)
    to_axes = (axes.transData - axes.transAxes).transform
    places = [float(to_axes((1, value))[1]) for value, *_ in ordered]
    # Neighbours that are too close form a group, which is spread about its own mean.
    groups = [[i] for i in range(len(places))]
    centre = list(places)
    merged = True
    while merged:
        merged = False
        for left, right in itertools.pairwise(range(len(groups))):
            reach = gap * (len(groups[left]) + len(groups[right])) / 2
            if centre[right] - centre[left] < reach:
                groups[left : right + 1] = [groups[left] + groups[right]]
                centre[left : right + 1] = [float(np.mean([places[i] for i in groups[left]]))]
                merged = True
                break
    for group, middle in zip(groups, centre, strict=True):
        for rank, i in enumerate(group):
            height = middle + gap * (rank - (len(group) - 1) / 2)
            value, text, color = ordered[i]
            axes.annotate(
                text,
                xy=(1, places[i]),
                xytext=(1.025, height),
                xycoords="axes fraction",
                textcoords="axes fraction",
                color=color if color != GREY else "#5B616A",
                fontsize=9.5,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1},
            )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high for a log axis: at most a dozen, and closer together where the axis is wider."""
    steps = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]
    ticks: list[float] = []
    at = 10.0 ** math.floor(math.log10(low))
    unit = at
    while at <= high * 1.05:
        # The next tick is the nearest round one that leaves room for its label.
        room = at * ((high / low) ** (1 / 11) - 1)
        unit = 10.0 ** math.floor(math.log10(at * 1.0000001))
        step = min((s * unit for s in steps if s * unit >= room), default=unit)
        if at >= low * 0.95:
            ticks.append(round(at, 9))
        at = (math.floor(at / step + 1e-6) + 1) * step
    return ticks


def _column(lines: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], float)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(x: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"
