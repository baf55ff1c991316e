"""Small models trained in a few lines, for studies: many of them, one after the other, each a program of its own."""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from layers.layer import Tokens
from models.lm import LM, LanguageModel, Skip
from models.loss import Scores, score_tokens
from models.parameters import Params, Structure, flatten
from probes.evaluation import Answer
from training.data import Batch, DataError, Dataset
from training.experiment import AdamW, Experiment, Muon, Train
from training.optimizer import build_optimizer
from training.step import init_state, train_step


class SmallRun:
    """A model over a dataset: `train` goes on step by step, `accuracy` asks it as it is."""

    def __init__(self, model: LM, data: Dataset, optimizer: AdamW | Muon, steps: int):
        self.data, self.model = data, model
        self.experiment = Experiment("study", model, data.config, optimizer, Train(steps=steps))
        shapes = jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0)))
        self.structure: Structure = flatten(shapes)[1]
        self.optimizer = build_optimizer(optimizer, steps, self.experiment.train.clip, self.structure.specs)
        step = train_step(self.experiment, self.structure, self.optimizer, data.token_bytes, data.labelled)
        self._step = jax.jit(step, donate_argnums=0)
        self._asked = jax.jit(self._score, static_argnames="skip")
        self.answers = answerer(self.structure)

    def train(self, seed: int, every: int) -> Iterator[tuple[int, Params, float]]:
        """(steps done, parameters, loss of the last step) after every so many steps."""
        params, _ = flatten(self.model.build(rngs=nnx.Rngs(seed)))
        state: Any = init_state(self.experiment, params, self.optimizer)
        for done in range(1, self.experiment.train.steps + 1):
            state, metrics = self._step(state, self.data.batch(seed, done - 1))  # type: ignore[arg-type]
            if done % every == 0 or done == self.experiment.train.steps:
                yield done, state["params"], float(metrics["loss"])

    def _score(self, params: Params, batch: Batch, skip: tuple[str, ...]) -> tuple[Any, Any]:
        model: LanguageModel = self.structure.module(params)
        scores = scored(model, batch, None, skip)
        return jnp.sum(scores.correct), jnp.sum(scores.asked)

    def accuracy(self, params: Params, skip: tuple[str, ...] = (), batches: Iterable[Batch] | None = None) -> float:
        """Share of the held-out questions (or those of `batches`) answered right, without the layers of `skip`."""
        asked = self.data.held_out() if batches is None else batches
        counts = np.sum([jax.device_get(self._asked(params, batch, skip=skip)) for batch in asked], 0)
        return float(counts[0] / counts[1])


def scored(model: LanguageModel, batch: Batch, labelled: int | None, skip: Skip = ()) -> Scores:
    """Of all places, or of the labelled ones alone."""
    tokens = Tokens(jnp.asarray(batch.ids_BT), jnp.asarray(batch.pos_BT))
    ahead = None if batch.prefix_BT is None else jnp.asarray(batch.prefix_BT)
    labels_BT = jnp.asarray(batch.labels_BT)
    return score_tokens(model, tokens, labels_BT, labelled=labelled, skip=skip, prefix_BT=ahead)[0]


def answerer(structure: Structure) -> Callable[..., Answer]:
    """(parameters, layers to leave out) -> how a model with these parameters answers."""

    @functools.partial(jax.jit, static_argnames=("labelled", "skip"))
    def said(params: Params, batch: Batch, labelled: int | None, skip: tuple[str, ...]) -> tuple[Any, Any]:
        scores = scored(structure.module(params), batch, labelled, skip)
        return scores.best, scores.nll

    def answers(params: Params, skip: tuple[str, ...] = ()) -> Answer:
        return lambda batch, labelled: said(params, batch, labelled=labelled, skip=skip)

    return answers


class Ledger:
    """Rows in a file of JSON lines: what is in it is not done again.

    A last line that was cut short, by a kill or a full disk, is taken away and its row done again. DataError for any
    other that is no JSON. writable: False for a look at a file that another program may be writing; nothing is changed.
    """

    def __init__(self, path: Path, *, writable: bool = True):
        if writable:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self._writable = path, [], writable
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines) or line.endswith("\n"):
                    raise DataError(
                        f"{path}, line {number}: no row of JSON ({error.msg}); take the line away"
                    ) from error
                if writable:
                    path.write_text("".join(lines[:-1]))
            else:
                if writable and not line.endswith("\n"):  # cut between a row and its end
                    path.write_text("".join(lines) + "\n")

    def has(self, **key: Any) -> bool:
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, *rows: dict[str, Any], **row: Any) -> None:
        """Rows, or one by its fields, at the file's end."""
        every = [*rows, row] if row else list(rows)
        self.rows += every
        with self.path.open("a") as file:
            file.write("".join(json.dumps(r) + "\n" for r in every))

    def drop(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Takes rows away; the file, where it may be written, is replaced whole."""
        kept = [row for row in self.rows if not unwanted(row)]
        before, self.rows = self.rows, kept
        if self._writable and len(kept) < len(before):
            aside = self.path.with_name(f"{self.path.name}.new")
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept))
            aside.replace(self.path)


Questions = list[tuple[dict[str, Any], Callable[[], Iterable[Batch]]]]  # what a row of the ledger calls them, and they


def train_and_ask(
    ledger: Ledger,
    key: dict[str, Any],
    run: Callable[[], SmallRun],
    questions: Questions,
    steps: int,
    seeds: int,
    console: Console,
) -> None:
    """A model for each seed, trained and asked all questions, unless the ledger has its answers. key: its name."""
    made = None
    for seed in range(seeds):
        mine = {**key, "seed": seed, "steps": steps}
        if ledger.has(**mine, **questions[-1][0]):
            continue
        made, start = made or run(), time.time()
        *_, (_, params, loss) = made.train(seed, steps)
        said = []
        for name, batches in questions:
            right = made.accuracy(params, batches=batches())
            ledger.add(**mine, **name, accuracy=right, loss=loss)
            said.append(f"{' '.join(f'{k} {v}' for k, v in name.items())}: {right:.3f}")
        model = " ".join(map(str, key.values()))
        console.print(f"{model}, seed {seed}: {', '.join(said)} ({time.time() - start:.0f} s)")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.3f}"


def door(
    about: str,
    study: Callable[[Ledger, int, int, Console], None],
    report: Callable[[Ledger, Path, int, int], None],
    folder: Path,
    steps: int = 400,
) -> None:
    """The command line of a study: what is not in its ledger is trained, and then the report is written."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=folder, help=f"where it is written (default {folder})")
    parser.add_argument("--steps", type=int, default=steps, help=f"of training (default {steps})")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default 3)")
    options = parser.parse_args()
    ledger, console = Ledger(options.folder / "study.jsonl"), Console()
    study(ledger, options.steps, options.seeds, console)
    report(ledger, options.folder, options.steps, options.seeds)
    console.print(f"wrote study.md and its picture in {options.folder}")


def curves(axes: Any, rows: list[dict[str, Any]], x: str, y: str, names: list[str]) -> None:
    """A line for each name: the mean over seeds, and the least and most as a band."""
    for i, name in enumerate(names):
        mine = [row for row in rows if row["name"] == name]
        at = sorted({row[x] for row in mine})
        values = [[row[y] for row in mine if row[x] == place] for place in at]
        axes.plot(at, [float(np.mean(v)) for v in values], marker="o", ms=3, color=f"C{i}", label=name)
        axes.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.15, lw=0)
    axes.grid(alpha=0.3)
    axes.legend()
