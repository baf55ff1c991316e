"""A study's pictures, each beside what is to be said of it: the main one, slices, learning, settings."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

from probes.blocks import Picture
from probes.charts import At, X, heat, lines, panels, points
from probes.evaluation import named
from probes.matrix import Draw, both, cells, matrix
from probes.scatter import scatter
from probes.study import Numbers, Study
from probes.study_numbers import Result, Setting, good, guessers, guesses, guessing, mean, of_slice, ranked, slices

STEMS = ("main", "slices", "validation", "settings")
FEW = 8  # lines that one picture holds
Drawn = tuple[Draw, str, str]  # a picture, what it says to who cannot see it, and what stands below it
GUESS = " Dotted: what guessing reaches, of a row's answers where it says any."


def pictures(study: Study, found: Sequence[Result], folder: Path) -> list[Picture]:
    """Draws them into the folder, light and dark, as PNG and SVG; what was there of an earlier report is replaced."""
    for stem in STEMS:
        for old in (f"{stem}{mood}{kind}" for mood in ("", "-dark") for kind in (".png", ".svg")):
            (folder / old).unlink(missing_ok=True)
    trained = ranked(found)
    if not trained:
        return []
    out = []
    for stem, drawn in zip(STEMS, (_main, _slices, _validation, _settings), strict=True):
        if (made := drawn(study, trained)) is not None:
            with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollars is no formula
                both(made[0], folder / stem)
            out.append(Picture(stem, made[1], made[2]))
    return out


def _measure(trained: Sequence[Result]) -> tuple[str, bool, bool]:
    """What it is called, whether it is a share (of 1), and whether more of it is better."""
    row = trained[0].chosen[0]
    return row["measure"], row["measure"] == "accuracy", row["higher"]


def _seeds(trained: Sequence[Result], what: str = "Bars") -> str:
    return f"{what}: least to most over seeds." if max(len(r.chosen) for r in trained) > 1 else "One seed each."


def _at(x: float, values: Sequence[float]) -> At:
    return At(x, mean(values), min(values), max(values))


def _extremes(trained: Sequence[Result], measure: str) -> str:
    best, last = trained[0], trained[-1]
    said = f"{best.name} is best with {measure} {best.test:.3f}"
    return f"{said}, {last.name} is last with {last.test:.3f}." if last is not best else f"{said}."


def _main(study: Study, trained: Sequence[Result]) -> Drawn:
    if study.versus == "state_bytes":
        return _beside_state(study, trained)
    return _along(study, trained) if study.versus else _in_order(trained)


def _in_order(trained: Sequence[Result]) -> Drawn:
    measure, share, _ = _measure(trained)
    bar = guessing(trained)
    draw = points(
        f"{measure.capitalize()} of each cell", {r.name: _at(0, r.tests) for r in trained}, f"{measure}, test rows", bar
    )
    caption = f"Cells from the best to the last, each at its best setting. {_seeds(trained)}"
    return draw, f"{measure} of each cell: {_extremes(trained, measure)}", caption + (GUESS if bar is not None else "")


def _groups(trained: Sequence[Result], names: Iterable[str], place: Callable[[Result], float]) -> dict[str, list[At]]:
    """Lines of cells that agree in the axes named, along their places; cells of one place are that place's line."""
    keys = set(names)
    out: dict[str, list[At]] = {}
    for result in trained:
        said = ", ".join(choice for axis, choice in result.resolved.cell.choices if axis in keys)
        out.setdefault(said, []).append(_at(place(result), result.tests))
    return {name: sorted(line, key=lambda at: at.x) for name, line in out.items()}


def _beside_state(study: Study, trained: Sequence[Result]) -> Drawn:
    measure, share, _ = _measure(trained)
    bar = guessing(trained)
    axes = [axis.name for axis in study.axes if len(axis.choices) > 1]
    lead, rest = axes[:1], axes[1:]
    series = _groups(
        trained, lead if rest else [axis.name for axis in study.axes], lambda r: r.resolved.costs["state_bytes"]
    )
    hollow: dict[str, list[tuple[float, float]]] = {}
    for point in study.references:
        if point.state_bytes is not None:
            hollow.setdefault(f"{point.name} (published)", []).append((float(point.state_bytes), point.value))
    title = f"{measure.capitalize()} beside bytes of state"
    draw = scatter(title, series, hollow, "bytes of state, one sequence", measure, share=share, guess=bar)
    caption = f"Each cell at its best setting. {_seeds(trained)}"
    if rest:
        caption += f" A line joins the cells of one {lead[0]}, which differ in {' and '.join(rest)}."
    caption += GUESS if bar is not None else ""
    caption += " Hollow: published." if hollow else ""
    return draw, f"{measure} beside bytes of state: {_extremes(trained, measure)}", caption


def _along(study: Study, trained: Sequence[Result]) -> Drawn:
    measure, share, _ = _measure(trained)
    axis = next(axis for axis in study.axes if axis.name == study.versus)
    choices = [choice.name for choice in axis.choices]
    places, log = spaced(choices)
    others = [other.name for other in study.axes if other is not axis and len(other.choices) > 1]
    at = dict(zip(choices, places, strict=True))
    place: Callable[[Result], float] = lambda result: at[dict(result.resolved.cell.choices)[axis.name]]  # noqa: E731
    series = _groups(trained, others, place)
    if not others:
        series = {measure: next(iter(series.values()))}
    bars: dict[float, list[float]] = {}
    for result in trained:
        if (bar := guesses(result.chosen[0])) is not None:
            bars.setdefault(place(result), []).append(bar)
    draw = lines(
        f"{measure.capitalize()} along {axis.name}",
        series,
        X(axis.name, tuple(zip(places, choices, strict=True)), log),
        f"{measure}, test rows",
        share=share,
        guesses=sorted((x, mean(ys)) for x, ys in bars.items()),
    )
    caption = f"Each cell at its best setting. {_seeds(trained, 'Bands')}" + (GUESS if bars else "")
    return draw, f"{measure} along {axis.name}: {_extremes(trained, measure)}", caption


def spaced(names: Sequence[str]) -> tuple[list[float], bool]:
    """Where choices stand: at their numbers, by powers if they span much; one after the other if some is no number."""
    try:
        values = [float(name.replace(",", "")) for name in names]
    except ValueError:
        return list(map(float, range(len(names)))), False
    if not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        return list(map(float, range(len(names)))), False
    return values, min(values) > 0 and max(values) / min(values) >= 8


def _slices(study: Study, trained: Sequence[Result]) -> Drawn | None:
    names = slices(trained)
    if not names:
        return None
    parts = {named(score["slice"]): score for result in trained for score in result.chosen[0]["scores"]}
    every = [parts[name]["slice"] for name in names]
    alike = all(list(part) == list(every[0]) for part in every)
    panel = " / ".join(every[0]) if alike else "slice"
    columns = [", ".join(map(str, part.values())) for part in every] if alike else names
    values = {
        result.name: {panel: cells([[_accuracy(row, name) for name in names] for row in result.chosen])}
        for result in trained
    }
    values |= {who: {panel: cells([[bars.get(name) for name in names]])} for who, bars in guessers(trained).items()}
    draw = matrix("Accuracy by slice", {panel: columns}, values)
    means = {
        name: mean([x for r in trained for row in r.chosen if (x := _accuracy(row, name)) is not None])
        for name in names
    }
    easy, hard = max(names, key=lambda name: means[name]), min(names, key=lambda name: means[name])
    alt = f"accuracy by cell and slice; over all cells {easy} has {means[easy]:.3f} and {hard} has {means[hard]:.3f}"
    return draw, alt, "Mean over seeds; after ±, half of what lies between the least and the most."


def _accuracy(row: dict, name: str) -> float | None:
    score = of_slice(row, name)
    return None if score is None else score["accuracy"]


def _validation(study: Study, trained: Sequence[Result]) -> Drawn:
    measure, share, _ = _measure(trained)
    series = {result.name: _curve(result) for result in trained}
    title, label = "Validation while training", f"{measure}, validation"
    if len(series) > FEW:
        draw = panels(title, series, "training step", label, share=share)
    else:
        draw = lines(title, series, X("training step"), label, share=share, marked=False)
    ends = {name: line[-1].mean for name, line in series.items()}
    first = next(iter(ends))
    alt = f"validation by training step; at its end {first} has {ends[first]:.3f}"
    caption = f"{measure.capitalize()} of rows that are neither trained on nor tested, at each cell's best setting. "
    caption += _seeds(trained, "Bands")
    return draw, alt, caption + (" Grey: from the least to the most of all cells." if len(series) > FEW else "")


def _curve(result: Result) -> list[At]:
    """Mean over the seeds: one that reached the goal and stopped keeps its last value."""
    curves = [{step: value for step, _, value in row["curve"]} for row in result.chosen]
    out = []
    for step in sorted({step for curve in curves for step in curve}):
        values = [curve[max(s for s in curve if s <= step)] for curve in curves if min(curve) <= step]
        out.append(_at(step, values))
    return out


def _settings(study: Study, trained: Sequence[Result]) -> Drawn | None:
    every = list(dict.fromkeys(arm.setting for result in trained for arm in study.arms(result.resolved.cell)))
    if all(len({arm.setting for arm in study.arms(result.resolved.cell)}) < 2 for result in trained):
        return None
    measure, share, higher = _measure(trained)
    parts = [part for part in range(3) if len({setting[part] for setting in every}) > 1]
    rows = {
        result.name: [
            mean([row["validation"] for row in result.settings[setting]]) if setting in result.settings else None
            for setting in every
        ]
        for result in trained
    }
    marks = [-1 if result.best is None else every.index(result.best) for result in trained]
    columns = [", ".join(setting_part(setting, part) for part in parts) for setting in every]
    label = ", ".join(PARTS[part] for part in parts)
    draw = heat("Validation by setting", columns, rows, marks, label, share=share, higher=higher)
    known = [x for row in rows.values() for x in row if x is not None]
    top = max(known, key=lambda x: good(x, higher))
    alt = f"mean validation by cell and setting ({label}); the best of all is {top:.3f}"
    return draw, alt, f"Mean {measure} over seeds, of validation rows. Framed: the setting that was chosen."


PARTS = ("learning rate", "weight decay", "factor of the matrices at the start")


def setting_part(setting: Setting, part: int) -> str:
    """One of a setting's numbers in words."""
    value = Numbers(0, *setting).setting[part]
    return "the optimizer's" if value is None else f"{value:g}"
