"""What a ledger of trials says, as Markdown and pictures: made of its rows alone, so again without training."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes.charts import At
from probes.evaluation import named
from probes.matrix import both, cells, matrix, picture
from probes.scatter import scatter
from probes.tasks import task

Row = dict[str, Any]
PANELS = ("distance", "pair", "slot", "depth", "distractors", "since", "older")


def write(rows: Sequence[Row], folder: Path) -> Path:
    """report.md and its pictures, of the newest rows of each model, probe and seed; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    latest = {(row["probe"], row["model"], row["seed"]): row for row in rows}
    probes = list(dict.fromkeys(row["probe"] for row in latest.values()))
    lines = ["# Probes", ""]
    for probe in sorted(probes):
        mine = [row for row in latest.values() if row["probe"] == probe]
        newest = {row["model"]: row["config"] for row in mine}  # seeds of another config are of another trial
        lines += _section(probe, [row for row in mine if row["config"] == newest[row["model"]]], folder)
    path = folder / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def about(probe: str) -> str:
    """What a probe asks: its own words, or the first sentence of its task's file."""
    trial = task.discover().get(probe)
    if trial is None:
        return ""
    doc = importlib.import_module(type(trial.data.test[0].task).__module__).__doc__ or ""
    return trial.about or " ".join(doc.split("\n\n")[0].split())


def _section(probe: str, rows: list[Row], folder: Path) -> list[str]:
    models = sorted({row["model"] for row in rows}, key=lambda m: -_mean(rows, m, "accuracy"))
    first = rows[0]
    slices = [score["slice"] for score in first["scores"]]
    seeds = len({row["seed"] for row in rows})
    stem = probe.replace("@", "-")
    both(_by_slice(probe, rows, models, slices), folder / stem)
    lines = [f"## {probe}", "", about(probe), "", picture(stem, f"{probe}: accuracy by model and slice"), ""]
    lines += _table(rows, models, slices, seeds)
    commands = dict.fromkeys(row.get("command", "") for row in rows)
    lines += ["", "```", *filter(None, commands), "```", ""]
    widest = _most_telling(rows, models)
    if widest is not None:
        both(_by_question(probe, rows, models, widest), folder / f"{stem}-by")
        said = named(slices[widest])
        lines += [f"By what is known of each question ({said}):", "", picture(f"{stem}-by", f"{probe}: {said}"), ""]
    if len(models) > 2:
        longest = max(int(T) for T in first["state_bytes"])
        hits = {m: [r["accuracy"] for r in rows if r["model"] == m] for m in models}
        points = {m: [At(_bytes(rows, m, longest), float(np.mean(h)), min(h), max(h))] for m, h in hits.items()}
        if all(line[0].x for line in points.values()):
            chance = float(np.mean([score["chance"] for score in first["scores"]]))
            title, x = f"{probe}: mean accuracy and state", f"bytes of state, made for {longest:,} tokens"
            both(scatter(title, points, {}, x, "accuracy", share=True, guess=chance), folder / f"{stem}-state")
            lines += [picture(f"{stem}-state", f"{probe}: accuracy beside bytes of state"), ""]
    return lines


def _table(rows: list[Row], models: list[str], slices: list[dict], seeds: int) -> list[str]:
    first = rows[0]
    longest = max(int(T) for T in first["state_bytes"])
    head = [
        "model",
        "seeds",
        *map(named, slices),
        "balanced",
        "whole answers",
        f"state, bytes ({longest:,} tokens)",
        "parameters",
        "steps to goal (CPU s)",
        "CPU s in all",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        accuracies = [_spread([row["scores"][i]["accuracy"] for row in mine]) for i in range(len(slices))]
        reached = [(row["goal_step"], row["goal_cpu_seconds"]) for row in mine if row["goal_step"] is not None]
        steps, seconds = np.median(reached, axis=0) if reached else (0, 0)
        goal = f"{steps:,.0f} ({seconds:.0f})" if len(reached) == len(mine) else f"{len(reached)} of {len(mine)} seeds"
        spent = f"{np.median([row['cpu_seconds'] for row in mine]):.0f}"
        means = [f"{np.mean([s[key] for row in mine for s in row['scores']]):.3f}" for key in ("balanced", "exact")]
        facts = [*means, f"{_bytes(rows, model, longest):,}", f"{mine[0]['parameters']:,}", goal, spent]
        lines.append(f"| {' | '.join([model, str(len(mine)), *accuracies, *facts])} |")
    for name in ("plateau", "chance"):
        guesses = ["" if score[name] is None else f"{score[name]:.3f}" for score in first["scores"]]
        if any(guesses):
            lines.append(f"| *{name}* | | {' | '.join(guesses)} | | | | | | |")
    trained = f"{first['rows_trained']:,} rows, {first['tokens']:,} tokens, {first['steps']:,} steps"
    rows_said = ", ".join(f"{score['rows']:,}" for score in first["scores"])
    said = "Mean over seeds (least to most)" if seeds > 1 else "One seed"
    return [
        *lines,
        "",
        f"{said}. Trained on {trained}. Goal: {first['goal']:.0%} of questions like those trained on, in other rows. "
        "Balanced: each word that is an answer weighs the same, as in MAD; whole answers: every token right, which "
        f"counts where an answer has several; both are means over the slices. Test rows: {rows_said}. "
        f"Law of the first column: `{first['scores'][0]['law']}`.",
    ]


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}–{max(values):.2f})"


def _mean(rows: list[Row], model: str, key: str) -> float:
    return float(np.mean([row[key] for row in rows if row["model"] == model]))


def _bytes(rows: list[Row], model: str, T: int) -> int:
    return next(row["state_bytes"][str(T)] for row in rows if row["model"] == model)


def _by_slice(probe: str, rows: list[Row], models: list[str], slices: list[dict]):
    columns = [", ".join(map(str, slice.values())) for slice in slices]
    panel = " / ".join(slices[0])
    mine = {m: [[s["accuracy"] for s in row["scores"]] for row in rows if row["model"] == m] for m in models}
    scores = rows[0]["scores"]
    guides = {panel: cells([[s["chance"] if s["plateau"] is None else s["plateau"] for s in scores]])}
    return matrix(f"{probe}: accuracy", {panel: columns}, {m: {panel: cells(mine[m])} for m in models}, guides)


def _most_telling(rows: list[Row], models: list[str]) -> int | None:
    """The slice in which models differ most, of those that tell something of their questions."""
    spreads = [
        (float(np.std([np.mean([r["scores"][i]["accuracy"] for r in rows if r["model"] == m]) for m in models])), i)
        for i, score in enumerate(rows[0]["scores"])
        if any(len(score["by"].get(name, ())) > 1 for name in PANELS)
    ]
    return max(spreads)[1] if spreads else None


def _by_question(probe: str, rows: list[Row], models: list[str], which: int):
    """Rows of a ledger may have bins of their own: all are shown in the fewest."""
    every = [row["scores"][which]["by"] for row in rows]
    names = [name for name in PANELS if all(len(by.get(name, ())) > 1 for by in every)]
    bins = {name: min((by[name] for by in every), key=len) for name in names}
    panels = {name: [_range(b) for b in bins[name]] for name in names}
    values = {
        m: {n: cells([_within(r["scores"][which]["by"][n], bins[n]) for r in rows if r["model"] == m]) for n in names}
        for m in models
    }
    return matrix(f"{probe}, {named(rows[0]['scores'][which]['slice'])}", panels, values)


def _within(fine: list[dict[str, Any]], bins: list[dict[str, Any]]) -> list[float | None]:
    """Accuracy in bins, of finer ones that lie within them; None where none does."""
    out: list[float | None] = []
    for b in bins:
        mine = [f for f in fine if b["low"] <= f["low"] and f["high"] <= b["high"]]
        asked = sum(f["questions"] for f in mine)
        out.append(sum(f["accuracy"] * f["questions"] for f in mine) / asked if asked else None)
    return out


def _range(b: dict[str, Any]) -> str:
    return f"{b['low']:,}" if b["low"] == b["high"] else f"{b['low']:,}–{b['high']:,}"
