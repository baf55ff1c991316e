"""Small models trained on a probe and asked it: what `python probe.py CONFIG --probes ...` does.

One row of JSON for each (model, probe, seed) is added to a ledger when it is done: a trial that was stopped goes on
with the next seed, and a report is made of the ledger alone.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from layers.mlp import MLP
from models.lm import LM, Stage
from probes.bottleneck import for_task
from probes.evaluation import evaluate, mean_accuracy, named
from probes.small_runs import Ledger, SmallRun
from probes.tasks import draws
from probes.tasks.task import Part, Trial
from training.experiment import AdamW, Experiment, Muon, Schedule, Train
from training.summary import parameter_count, state_bytes

CHECKS = 16  # of the accuracy, over a training
VALIDATION = 128  # rows of a law trained on, but of other seeds: the steps to a goal are not counted on the test rows


def small(layer: LayerConfig, trial: Trial) -> LM:
    """The usual small model around a layer: two of Zoology's blocks, unless the trial says otherwise."""
    mixer = _of_words(layer, trial.data.train[0].task.vocab)
    pattern: tuple[LayerConfig, ...] = (GatedConv(), mixer) if trial.conv else (mixer,)
    pattern += (MLP(),) * trial.mlp
    return LM(W=trial.data.train[0].task.vocab, D=trial.D, stages=(Stage(pattern, trial.blocks),), tied=True)


def adapted(model: LM, trial: Trial) -> LM:
    """A config's model, with the words of a task."""
    W = trial.data.train[0].task.vocab
    stages = tuple(
        dataclasses.replace(stage, pattern=tuple(_of_words(layer, W) for layer in stage.pattern))
        for stage in model.stages
    )
    ngrams = None if model.ngrams is None else dataclasses.replace(model.ngrams, W=W)
    return dataclasses.replace(model, W=W, stages=stages, ngrams=ngrams)


def _of_words(layer: LayerConfig, W: int) -> LayerConfig:
    if not hasattr(layer, "W"):
        return layer
    changes: dict[str, Any] = {"W": W}
    if getattr(layer, "canonical", None) is not None:  # which ids mean the same is known of the text's words alone
        changes["canonical"] = None
    return dataclasses.replace(layer, **changes)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One model on one probe: what a row of the ledger is of."""

    name: str
    model: LM
    probe: str
    trial: Trial
    optimizer: AdamW | Muon

    @property
    def config(self) -> str:
        """A short hash of everything that the numbers depend on, the seed apart."""
        said = [str(x) for x in (self.model, self.trial, self.optimizer)]
        laws = [part.task.name for part in self.trial.data.train + self.trial.data.test]
        laws += [] if self.trial.watched is None else [self.trial.watched.name]
        return hashlib.sha256("\n".join(said + laws).encode()).hexdigest()[:12]


def usual(trial: Trial) -> AdamW:
    warmup = max(1, trial.steps // 20)
    return AdamW(lr=trial.lr, schedule=Schedule(warmup=warmup, shape="cosine", final=0.0))


def experiment(layer: LayerConfig, trial: Trial) -> Experiment:
    """What a trial trains around a layer: what studies begin with."""
    return Experiment(
        description=f"{type(layer).__name__}, asked what it recalls.",
        model=small(layer, trial),
        data=trial.data,
        optimizer=usual(trial),
        train=Train(steps=trial.steps),
    )


def run(ledger: Ledger, attempts: Sequence[Attempt], seeds: int, console: Console, command: str = "") -> None:
    """Trains what the ledger does not have. command: what asked for it, kept with each row."""
    for attempt in attempts:
        made: SmallRun | None = None
        for seed in range(seeds):
            if ledger.has(probe=attempt.probe, model=attempt.name, config=attempt.config, seed=seed):
                continue
            made = made or _made(attempt)
            row = _one(attempt, made, seed, console)
            ledger.add(**row, command=command)
            console.print(said(row))


def said(row: dict[str, Any]) -> str:
    """A row of the ledger in a line."""
    scores = ", ".join(f"{named(score['slice'])}: {score['accuracy']:.3f}" for score in row["scores"])
    goal = "" if row["goal_step"] is None else f"; {row['goal']:.0%} after {row['goal_step']:,} steps"
    return f"{row['probe']} | {row['model']}, seed {row['seed']}: {scores} ({row['cpu_seconds']:.0f} CPU s{goal})"


def _made(attempt: Attempt) -> SmallRun:
    data = attempt.trial.data.build()
    made = SmallRun(for_task(attempt.model, data.config), data, attempt.optimizer, attempt.trial.steps)
    next(made.train(0, 1))  # compiles, which is not training
    return made


def _one(attempt: Attempt, made: SmallRun, seed: int, console: Console) -> dict[str, Any]:
    trial = attempt.trial
    test = trial.data.test
    watched = Part(trial.goal_law, VALIDATION)
    aside = draws.fold(watched.task.test_seed(), 1)
    every = max(1, trial.steps // CHECKS)
    curve: list[tuple[int, float, float, float]] = []  # steps, loss, accuracy, CPU seconds of training
    cpu = wall = 0.0
    title = f"{attempt.probe} | {attempt.name}, seed {seed}"
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(title, total=trial.steps)
        before = time.process_time(), time.perf_counter()
        for done, params, loss in made.train(seed, every):
            cpu, wall = cpu + time.process_time() - before[0], wall + time.perf_counter() - before[1]
            (score,) = evaluate(made.answers(params), [watched], aside, labelled=made.data.labelled)
            curve.append((done, loss, score.accuracy, cpu))
            progress.update(bar, completed=done, description=f"{title}: {score.accuracy:.3f}")
            before = time.process_time(), time.perf_counter()
    scores = evaluate(made.answers(params), test, labelled=made.data.labelled)
    reached = next(((step, spent) for step, _, right, spent in curve if right >= trial.goal), (None, None))
    tokens = trial.data.T * trial.data.B
    return {
        "probe": attempt.probe,
        "model": attempt.name,
        "config": attempt.config,
        "seed": seed,
        "steps": trial.steps,
        "tokens": trial.steps * tokens,
        "rows_trained": trial.steps * trial.data.B,
        "parameters": parameter_count(made.structure.specs),
        "state_bytes": bytes_by_length(attempt.model, sorted({part.task.length for part in test})),
        "loss": curve[-1][1],
        "accuracy": mean_accuracy(scores),
        "goal": trial.goal,
        "goal_step": reached[0],
        "goal_cpu_seconds": reached[1],
        "cpu_seconds": cpu,
        "seconds": wall,
        "device": jax.devices()[0].device_kind,
        "curve": [(step, right) for step, _, right, _ in curve],
        "scores": [score.json() for score in scores],
    }


def bytes_by_length(model: LM, lengths: Sequence[int]) -> dict[str, int]:
    """Bytes of one sequence's state, measured from its arrays, by the longest sequence that it is made for."""
    shapes = jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0)))
    return {str(T): state_bytes(shapes, T) for T in lengths}
