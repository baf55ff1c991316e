"""The questions every trained model is asked when its run ends: does it recall what it has read?"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from models.lm import LanguageModel
from probes.evaluation import Answer, evaluate, table
from probes.figures import recall_curve, repetition_curve
from probes.repetition import read_twice
from probes.small_runs import scored
from probes.tasks.task import Part, ProbeData
from training.data import Batch


def look(outcome: dict[str, Any], run: Path, console: Console | None = None) -> None:
    """Draws figures/recall.png and writes recall.jsonl in a run's folder.

    A model of a probe is asked its test questions by slice, and where its task has them the same made harder step by
    step (twice the pairs, four times the pairs ...); a model of text reads held-out passages twice.
    `outcome`: of training.run.train, with its `model` and `dataset`.
    """
    console = console or Console()
    model, dataset = outcome["model"], outcome["dataset"]
    (run / "figures").mkdir(exist_ok=True)
    rows = run / "recall.jsonl"
    if isinstance(dataset, ProbeData):
        scores = evaluate(_likeliest(model), and_harder(dataset.config.test))
        console.print(table(scores))
        where = {"run": run.name, "step": outcome["step"]}
        rows.write_text("".join(json.dumps(where | score.json()) + "\n" for score in scores))
        picture, _ = recall_curve({run.name: scores}, run / "figures" / "recall")
    else:
        readings = read_twice(model, dataset)
        if not readings:
            return
        grid = Table("tokens apart", "first reading", "second reading", "nats saved a token")
        for r in readings:
            grid.add_row(f"{r.distance}", f"{r.first:.1%}", f"{r.second:.1%}", f"{r.gain:.2f}")
        console.print(grid)
        rows.write_text("".join(json.dumps({"step": outcome["step"]} | dataclasses.asdict(r)) + "\n" for r in readings))
        picture, _ = repetition_curve(readings, run / "figures" / "recall")
    console.print(f"written: {picture}, {rows}", highlight=False, soft_wrap=True)


def and_harder(parts: tuple[Part, ...]) -> list[Part]:
    """Parts, each followed by its harder kin."""
    asked: dict[str, Part] = {}
    for part in parts:
        task: Any = part.task
        while task is not None:
            asked.setdefault(task.name, dataclasses.replace(part, task=task))
            task = task.harder()
    return list(asked.values())


def _likeliest(model: LanguageModel) -> Answer:
    @jax.jit
    def answer(model: LanguageModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
        scores = scored(model, batch, None)
        return scores.best, scores.nll

    return lambda batch, _: answer(model, batch)
