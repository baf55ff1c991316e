"""What each part of a trained model is worth to it: a report with a picture, made of the ledger's rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.figures import COLOURS, FAINT
from probes.matrix import Draw, both, picture

ABOUT = {
    "layers": "The layer or MLP adds nothing to the residual stream; what follows reads the stream without it.",
    "tables": "The table that the layer looks up is all zeros.",
    "writes": "From the middle of each row on, the layer's state is what it was there: the layer knows the first half "
    "and the token itself, and nothing between. (All of its state stays: the tail of a convolution and the last ids of "
    "n-grams, too, so the figure is also of what they do.) A document that starts after the middle finds an empty "
    "state, and leaves it empty. Tokens after the middle alone are counted, of the whole model, too.",
    "window": "The layer's windows show no more than so many tokens, the token itself included.",
}
UNITS = {"bits_per_byte": "bits per byte", "accuracy": "accuracy"}
NOISE = 2.0  # standard errors: a difference below is no finding


def named(key: dict[str, Any]) -> str:
    """A ledger's row in a few words: place, layer, window."""
    window = "" if key["width"] is None else f", window {key['width']}"
    return f"{key['place']} {key['layer']}{window}"


def said(row: dict[str, Any]) -> str:
    """The line that a terminal shows."""
    return (
        f"{row['part']}: {named(row)}: {row['without']:.4f} {UNITS[row['measure']]}, {_difference(row)} "
        f"({row['tokens']:,} tokens, {row['seconds']:.1f} s)"
    )


def write(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> Path:
    """report.md and its picture; returns the file's path. rows: of one checkpoint, at least one.

    What was asked several times is shown as of the most tokens.
    """
    shown: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["part"], row["place"], row["layer"], row["width"])
        if key not in shown or shown[key]["tokens"] <= row["tokens"]:
            shown[key] = row
    parts = {part: [row for row in shown.values() if row["part"] == part] for part in ABOUT}
    parts = {part: mine for part, mine in parts.items() if mine}
    unit = UNITS[rows[-1]["measure"]]
    both(_picture(f"{name}: what its parts are worth", parts, unit), folder / "parts")
    lines = [f"# What the parts of {name} are worth", ""]
    lines += [
        f"The model of step {rows[-1]['step']:,}, asked its held-out data again without each part, untrained: {unit} "
        "without it, less the whole model's on the same rows. The standard error (±) is paired by row; a difference of "
        "less than two of them is noise, others are bold. What a model that was trained without the part would reach "
        "is another question: train it (`python ablate.py --help`)."
    ]
    lines += ["", picture("parts", f"{name}: what its parts are worth"), ""]
    for part, mine in parts.items():
        window = part == "window"
        lines += [f"## {part}", "", ABOUT[part], ""]
        lines += [f"| place | layer |{' window |' * window} whole | without | difference | ± | rows | tokens |"]
        lines += [f"|---|---|{'---:|' * (6 + window)}"]
        for row in mine:
            error = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
            difference = f"{row['difference']:+.4f}"
            difference = f"**{difference}**" if _sure(row) else difference
            cut = f" {row['width']} |" if window else ""
            lines += [
                f"| {row['place']} | {row['layer']} |{cut} {row['whole']:.4f} | {row['without']:.4f} | {difference} "
                f"| {error} | {row['rows']:,} | {row['tokens']:,} |"
            ]
        lines += [""]
    lines += ["A place is stage.repeat.layer; a star stands for all repeats together, `all` for every place there."]
    lines += ["", "```", *dict.fromkeys(row["command"] for row in rows), "```"]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _sure(row: dict[str, Any]) -> bool:
    return row["standard_error"] is not None and abs(row["difference"]) > NOISE * row["standard_error"]


def _difference(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _picture(title: str, parts: dict[str, list[dict[str, Any]]], unit: str) -> Draw:
    """A panel for each part: a point for each row, its error twice the standard error, the numbers at the right."""

    def draw(dark: bool) -> Figure:
        heights = [0.9 + 0.21 * len(mine) for mine in parts.values()]
        figure = Figure(figsize=(8.2, 0.7 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(parts), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
        for axes, (part, mine) in zip(grid, parts.items(), strict=True):
            _panel(axes, mine, dark)
            whole = ", ".join(dict.fromkeys(f"{row['whole']:.4f} ({row['tokens']:,} tokens)" for row in mine))
            axes.set_title(f"{part}; the whole model: {whole}", fontsize=9, fontweight="normal")
        worse = "right" if unit == UNITS["bits_per_byte"] else "left"
        label = f"{unit} without it, less the whole model's: {worse} of 0, it is missed (bars: two standard errors)"
        grid[-1].set_xlabel(label, fontsize=8.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure

    return draw


def _panel(axes: Axes, mine: list[dict[str, Any]], dark: bool) -> None:
    sure, unsure = ("#56B4E9" if dark else COLOURS[0]), ("#8b949e" if dark else FAINT)
    for y, row in enumerate(mine):
        colour = sure if _sure(row) else unsure
        error = NOISE * (row["standard_error"] or 0.0)
        fill = colour if _sure(row) else "none"
        axes.plot([0, row["difference"]], [y, y], color=colour, lw=1, alpha=0.45)
        axes.errorbar([row["difference"]], [y], xerr=[error], color=colour, marker="o", ms=4.5, mfc=fill, capsize=2)
        at = axes.get_yaxis_transform()
        axes.text(1.01, y, _difference(row), transform=at, va="center", fontsize=7.5, color=colour)
    axes.axvline(0, color=unsure, lw=0.9)
    axes.set_yticks(range(len(mine)), [named(row) for row in mine], fontsize=8)
    axes.set_ylim(len(mine) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
