"""The questions every trained model is asked when its run ends: does it recall what it has read?"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from layers.layer import Tokens
from models.lm import LanguageModel
from probes.evaluation import append_json, evaluate, table
from probes.figures import recall_curve, repetition_curve
from probes.repetition import read_twice
from probes.tasks.recall import RecallDataset, Segment
from training.data import Batch


def look(outcome: dict[str, Any], run: Path, console: Console | None = None) -> None:
    """Draws figures/recall.png and writes recall.jsonl in a run's folder.

    A model of the recall task is asked its test questions by slice, and the same with twice the pairs, four times the
    pairs and so on, as long as they fit; a model of text reads held-out passages twice.
    `outcome`: of training.run.train, with its `model` and `dataset`.
    """
    console = console or Console()
    model, dataset = outcome["model"], outcome["dataset"]
    (run / "figures").mkdir(exist_ok=True)
    rows = run / "recall.jsonl"
    if isinstance(dataset, RecallDataset):
        questions = itertools.chain.from_iterable(dataset.questions(s) for s in _and_harder(dataset.config.test))
        scores = evaluate(_likeliest(model), questions, dataset.config.vocab)
        console.print(table(scores))
        rows.unlink(missing_ok=True)
        append_json(scores, rows, run=run.name, step=outcome["step"])
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


def _and_harder(segments: tuple[Segment, ...]) -> list[Segment]:
    asked = {}
    for segment in segments:
        pairs = segment.pairs
        while 4 * pairs <= segment.length:
            asked[segment.length, pairs] = dataclasses.replace(segment, pairs=pairs)
            pairs *= 2
    return [asked[key] for key in sorted(asked)]


def _likeliest(model: LanguageModel) -> Any:
    """A batch of recall questions -> the likeliest word at every place."""

    @jax.jit
    def answer(model: LanguageModel, ids: jax.Array, pos: jax.Array) -> jax.Array:
        return jnp.argmax(model(Tokens(ids, pos)).y_BTD, -1)

    return lambda batch: answer(model, *map(jnp.asarray, Batch(*batch)[:2]))
