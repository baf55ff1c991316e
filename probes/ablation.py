"""Trains what a study's ledger does not have: a program for each cell, all of its arms at once.

A row of the ledger is an arm that is done. A program that was stopped or killed goes on from its last checkpoint, which
lies in the study's folder until the program is done.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from models.lm import LM
from probes.bottleneck import for_task
from probes.evaluation import named, slices
from probes.grid import Arm, Grid
from probes.judge import Judge, judge
from probes.matching import Resolved, longest, resolve
from probes.small_runs import Ledger
from probes.study import Numbers, Study
from probes.tasks.task import Probe
from training.checkpoint import Checkpoints
from training.data import DataConfig, Dataset
from training.experiment import Experiment
from training.log import clock
from training.run import flatten_state, unflatten_state
from training.settings import ConfigError
from training.stop import Stop

LEDGER = "arms.jsonl"
UNFINISHED = "unfinished"  # folder of the checkpoints of programs under way
KEEP_SECONDS = 120.0  # between them
Told = Callable[..., None]  # steps done since it was last told, and what is on: as `Bar.told` takes them
Program = tuple[Resolved, list[Numbers]]  # a cell, and arms of it that train together


class Stopped(Exception):
    """A signal asked to leave; what was done is kept."""


@dataclasses.dataclass
class Work:
    """A study on its way: what is trained, what is known, and where it is kept."""

    study: Study
    name: str
    cells: list[Resolved]
    ledger: Ledger
    folder: Path
    command: str
    console: Console
    keep_seconds: float = KEEP_SECONDS


@functools.lru_cache(8)
def dataset_of(config: DataConfig) -> Dataset:
    return config.build()


def prepare(study: Study) -> list[Resolved]:
    """The cells, matched. Raises ConfigError, in a line, for what cannot be trained."""
    check_slices(study)
    try:
        cells = resolve(study, lambda experiment: dataset_of(experiment.data))
    except ValueError as error:
        if "\n" in str(error) or isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error
    for resolved in cells:
        experiment, words = resolved.cell.experiment, dataset_of(resolved.cell.experiment.data).words
        if experiment.model.W < words:
            raise ConfigError(f"{resolved.cell.name}: model.W is {experiment.model.W}, but the data has {words} words")
    return cells


def check_slices(study: Study) -> None:
    """Raises ConfigError for a claim or a reference at a slice that its cells are not asked."""
    by_name = {cell.name: cell for cell in study.cells}
    read = [(name, claim.slice) for claim in study.claims for name in (claim.more, claim.less)]
    read += [(point.name, point.slice) for point in study.references]
    for name, slice in read:
        if slice and (cell := by_name.get(name)) is not None:
            data = cell.experiment.data
            known = [named(said) for said in slices(data.test)] if isinstance(data, Probe) else []
            if slice not in known:
                raise ConfigError(f"{name!r} is read at {slice!r}, but is asked {'; '.join(known) or 'no slices'}")


def opened(path: Path, *, writable: bool = True) -> Ledger:
    """A study's ledger, without the arms of a program whose writing was cut short: they are done again, together.

    Whoever writes holds the folder's lock first: another's program may be half written.
    """
    ledger = Ledger(path, writable=writable)
    whole = collections.Counter((row["digest"], row["group"]) for row in ledger.rows)
    ledger.drop(lambda row: whole[row["digest"], row["group"]] < row["program"])
    return ledger


def key(resolved: Resolved, arm: Numbers) -> dict[str, Any]:
    """What a ledger knows an arm by."""
    return {"digest": resolved.digest, "arm": dataclasses.asdict(arm)}


def missing(study: Study, resolved: Resolved, ledger: Ledger) -> list[Numbers]:
    return [arm for arm in study.arms(resolved.cell) if not ledger.has(**key(resolved, arm))]


def programs(work: Work, only: Sequence[str] = ()) -> list[Program]:
    """What is to be trained: the arms that the ledger lacks, as many as train together, of cells named in `only`."""
    found: list[Program] = []
    for resolved in work.cells:
        arms = missing(work.study, resolved, work.ledger) if not only or resolved.cell.name in only else []
        size = work.study.together or len(arms)
        found += [(resolved, arms[low : low + size]) for low in range(0, len(arms), size or 1)]
    return found


def run(work: Work, only: Sequence[str] = ()) -> int:
    """Trains the arms that the ledger lacks, of the cells named in `only` or of all; returns how many those were.

    Raises Stopped after SIGTERM, SIGINT or SIGUSR1, when the state of the program under way is on the disk.
    """
    if not (todo := programs(work, only)):
        return 0
    with Stop() as stop, Bar(work, todo) as bar:
        for one in todo:
            keep(work, one, program(work, one, stop, functools.partial(bar.told, one)), bar)
    tidy(work)
    return bar.count


class Bar:
    """Where a study is, in FLOPs, since cells are not alike: a bar on a terminal, else a line now and then.

    every: seconds between lines.
    """

    def __init__(self, work: Work, todo: Sequence[Program], every: float = 60.0):
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        left = TextColumn("{task.fields[left]}")
        self._progress = Progress(*columns, TimeElapsedColumn(), left, console=work.console, transient=True)
        self.count, self._done = sum(len(arms) for _, arms in todo), 0
        self._bar = self._progress.add_task(f"0/{self.count} arms", total=sum(map(effort, todo)), left="")
        self._spent, self._under_way = 0.0, dict[str, float]()  # by this call; of programs that are not done
        self._console, self._every, self._began, self._spoke = work.console, every, time.monotonic(), -every

    def __enter__(self) -> "Bar":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def told(self, one: Program, steps: int, text: str, before: bool = False) -> None:
        """steps: done since it was last told; or before, by an earlier call, of which no speed is known."""
        flops = effort(one) * steps / one[0].cell.experiment.train.steps
        self._under_way[one[0].digest] = self._under_way.get(one[0].digest, 0.0) + flops
        self._spent += 0.0 if before else flops
        self._show(flops, f"{self._done}/{self.count} arms | {text}")
        now, task = time.monotonic(), self._progress.tasks[0]
        if not self._console.is_terminal and now - self._spoke >= self._every:
            self._spoke = now
            line = f"{task.description}  {task.percentage:.0f}%  {task.fields['left']}"
            self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def done(self, one: Program) -> None:
        self._done += len(one[1])
        self._show(effort(one) - self._under_way.pop(one[0].digest, 0.0))  # where it was at its goal early

    def _show(self, flops: float, text: str | None = None) -> None:
        """flops: that are not left any more."""
        self._progress.update(self._bar, advance=flops, description=text)
        seconds, remaining = time.monotonic() - self._began, max(0.0, self._progress.tasks[0].remaining or 0.0)
        if self._spent:
            self._progress.update(self._bar, left=f"eta {clock(remaining * seconds / self._spent)}")


def effort(one: Program) -> float:
    """FLOPs of a program."""
    resolved, arms = one
    experiment = resolved.cell.experiment
    return resolved.costs["flops"] * experiment.data.T * experiment.data.B * experiment.train.steps * len(arms)


def keep(work: Work, one: Program, rows: list[dict[str, Any]], bar: Bar) -> None:
    """Writes down the arms of a program that is done; its checkpoints are wanted no more."""
    work.ledger.add(*rows)
    shutil.rmtree(_unfinished(work, one[0]), ignore_errors=True)
    bar.done(one)
    work.console.print(said(rows), highlight=False)


def tidy(work: Work) -> None:
    with contextlib.suppress(OSError):  # of another study's programs that were stopped, it keeps them
        (work.folder / UNFINISHED).rmdir()


def said(rows: Sequence[dict[str, Any]]) -> str:
    """The arms of a program in a line."""
    values = [row["test"] for row in rows]
    spread = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
    seconds, first = sum(row["cpu_seconds"] for row in rows), rows[0]
    reached = [row["goal_step"] for row in rows if row["goal_step"] is not None]
    goal = f"; {len(reached)} reached the goal, in {min(reached):,} steps and more" if reached else ""
    arms = f"{len(rows)} arm{'s' * (len(rows) > 1)}"
    return f"{first['cell']}: {arms}, {first['measure']} {spread} ({seconds:.0f} CPU s{goal})"


def _unfinished(work: Work, resolved: Resolved) -> Path:
    return work.folder / UNFINISHED / resolved.digest


def program(work: Work, one: Program, stop: Stop, told: Told) -> list[dict[str, Any]]:
    """Rows of the ledger of arms that train together. Raises Stopped when their state is on the disk."""
    resolved, arms = one
    experiment = resolved.cell.experiment
    asked = judge(dataset_of(experiment.data), experiment.train.eval_batches)
    grid = build(experiment, arms)
    steps, every = experiment.train.steps, max(1, experiment.train.steps // work.study.checks)
    sofar = _Sofar([dataclasses.asdict(arm) for arm in arms], [[] for _ in arms], [None for _ in arms])
    begin: tuple[int, Any] | None = None
    with Checkpoints(_unfinished(work, resolved), keep_last=1, keep_best=0) as checkpoints:
        if (found := _restored(checkpoints, grid, sofar.arms)) is not None:
            begin, sofar = found
            told(begin[0], f"{resolved.cell.name}: goes on from step {begin[0]:,}", True)
        told(0, f"{resolved.cell.name}: compiles")
        next(grid.train())  # compiles, which is not training
        saved, watch = time.monotonic(), _Watch(sofar)
        for done, state, losses in grid.train(begin):
            check = done % every == 0 or done == steps
            left = stop.requested
            keep = left is not None or time.monotonic() - saved > work.keep_seconds
            if not (check or keep):
                continue
            loss_A = np.asarray(losses)  # waits for the devices
            watch.stop()
            if check:
                _ask(work.study, grid, asked, done, state, loss_A, sofar)
                told(min(every, done), f"{resolved.cell.name}: {_best(asked, sofar)}")
            if None not in sofar.ends:
                break
            if keep:
                checkpoints.save(done, flatten_state(state), dataclasses.asdict(sofar))
                saved = time.monotonic()
            if left is not None:
                checkpoints.wait()
                raise Stopped(left)
            watch.start()
    facts = _facts(work, resolved, asked, arms)
    spent = {"cpu_seconds": sofar.cpu / len(arms), "seconds": sofar.wall / len(arms)}
    return [
        {**facts, **key(resolved, arm), **(end or {}), **spent, "curve": curve}
        for arm, end, curve in zip(arms, sofar.ends, sofar.curves, strict=True)
    ]


@dataclasses.dataclass
class _Sofar:
    """What is known of a program's arms; with the state of training, all that it takes to go on.

    curves: (steps, loss, validation) of each. ends: what an arm that is done has for the ledger. cpu, wall: seconds.
    """

    arms: list[dict[str, Any]]
    curves: list[list[tuple[int, float, float]]]
    ends: list[dict[str, Any] | None]
    cpu: float = 0.0
    wall: float = 0.0


class _Watch:
    """Adds up the seconds of training, without what is spent on asking and saving."""

    def __init__(self, sofar: _Sofar):
        self._sofar = sofar
        self.start()

    def start(self) -> None:
        self._since = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        self._sofar.cpu += time.process_time() - self._since[0]
        self._sofar.wall += time.perf_counter() - self._since[1]


def _ask(study: Study, grid: Grid, asked: Judge, done: int, state: Any, loss_A: Any, sofar: _Sofar) -> None:
    """Validates the arms that are not done yet; those that reached the goal, or the last step, are tested."""
    last = done == grid.experiment.train.steps
    for a, end in enumerate(sofar.ends):
        if end is not None:
            continue
        answers = grid.answers(grid.of(state["params"], a))
        value = asked.validate(answers)
        sofar.curves[a].append((done, float(loss_A[a]), value))
        reached = study.goal is not None and (value >= study.goal if asked.higher else value <= study.goal)
        if reached or last:
            test, scores = asked.test(answers)
            sofar.ends[a] = {
                "steps": done,
                "goal_step": done if reached else None,
                "goal_cpu_seconds": sofar.cpu / len(sofar.arms) if reached else None,
                "skipped": int(np.asarray(state["counters"]["skipped"])[a]),
                "validation": value,
                "test": test,
                "scores": scores,
            }


def _restored(
    checkpoints: Checkpoints, grid: Grid, arms: list[dict[str, Any]]
) -> tuple[tuple[int, Any], _Sofar] | None:
    """What a stopped program left, if it was of these arms: with others, last digits would differ."""
    meta = checkpoints.peek()
    if meta is None or meta.get("arms") != arms:
        return None
    like = jax.eval_shape(grid.start)
    found = checkpoints.restore(flatten_state(like))
    if found is None:
        return None
    step, groups, meta = found
    return (step, unflatten_state(like, groups)), _Sofar(**meta)


def build(experiment: Experiment, arms: Sequence[Numbers]) -> Grid:
    """The arms of an experiment as a grid."""
    optimizer = experiment.optimizer
    data = dataset_of(experiment.data)
    model: LM = for_task(experiment.model, experiment.data)
    mine = [Arm(arm.seed, arm.rate / optimizer.lr, arm.weight_decay, arm.init) for arm in arms]
    return Grid(model, data, optimizer, experiment.train, mine)


def _best(asked: Judge, sofar: _Sofar) -> str:
    last = [curve[-1][2] for curve in sofar.curves]
    return f"best {asked.measure} {max(last) if asked.higher else min(last):.3f} of {len(last)}"


def _facts(work: Work, resolved: Resolved, asked: Judge, arms: Sequence[Numbers]) -> dict[str, Any]:
    """What all arms of a program have in common, as a ledger keeps it."""
    cell = resolved.cell
    group = hashlib.sha256(str(arms).encode()).hexdigest()[:12]
    return {
        "study": work.name,
        "cell": cell.name,
        "choices": dict(cell.choices),
        "measure": asked.measure,
        "higher": asked.higher,
        **resolved.costs,
        "length": longest(cell.experiment),
        "matched": [dataclasses.asdict(m) for m in resolved.matched],
        "tokens": cell.experiment.data.T * cell.experiment.data.B,
        "goal": work.study.goal,
        "program": len(arms),
        "group": group,
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("engrax", "jax", "flax", "optax")},
        },
        "command": f"{work.command} --only {shlex.quote(cell.name)}",
    }
