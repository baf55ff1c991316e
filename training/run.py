"""A run: from an experiment and a folder to a trained model, resumable at any moment.

A run folder holds config.py (the resolved experiment, as Python), metrics.jsonl, checkpoints/, figures/, samples.txt.
Batches are a function of (seed, step), steps of (state, batch): what is restored from a checkpoint goes on bit for bit
as if it had never stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from models.lm import LanguageModel
from models.parameters import Params, Structure, flatten
from training import processes, settings
from training.checkpoint import CheckpointError, Checkpoints
from training.data import NOT_ASKED, DataError, Dataset
from training.evaluate import evaluate
from training.experiment import Experiment
from training.layout import Layout, build_layout
from training.lock import RunLock
from training.log import METRICS, Log, NoLog, Progress
from training.optimizer import learning_rate
from training.program import build_model, build_program
from training.resume import record_of, refuse_another, source_of
from training.step import shown
from training.stop import Stop
from training.summary import flops_per_token, parameter_count, peak_flops, show, state_bytes, where
from training.watch import Profiler, Times, Watchdog

SHOWN = ("loss", "bits_per_byte", "accuracy", "grad_norm", "tokens_per_second")  # on the terminal, of what is logged


@dataclasses.dataclass
class Job:
    """An experiment made ready: abstract model, data, layout, and the jitted pure steps."""

    experiment: Experiment
    dataset: Dataset
    layout: Layout
    model: LanguageModel  # of ShapeDtypeStructs
    structure: Structure
    state: Any  # of ShapeDtypeStructs, with shardings
    share: slice | None  # the rows of a batch that this process makes; None for all
    feed: Any  # from these rows to what steps take
    init: Any
    step: Any
    evaluate: Any


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """A ValueError of ours, which is one line, becomes a ConfigError. Those of JAX are longer, and stay what they are:
    a program's error, not a user's."""
    try:
        yield
    except ValueError as error:
        if "\n" in str(error):
            raise
        raise settings.ConfigError(str(error)) from error


@_one_line()
def prepare(experiment: Experiment) -> Job:
    """Raises ConfigError, in a line that names the field, for what cannot be trained."""
    dataset = experiment.data.build()
    held_out = next(dataset.held_out(1), None)
    if held_out is None or (held_out.labels_BT == NOT_ASKED).all():
        raise DataError("the held-out data asks nothing, so there is nothing to evaluate on: raise data.held_out")
    if experiment.model.W < dataset.words:
        raise ValueError(
            f"model.W is {experiment.model.W}, but the data has {dataset.words} words: use --model.W {dataset.words}"
        )
    layout = build_layout(experiment.mesh, experiment.data.B, experiment.data.T, parts=experiment.train.accumulate)
    program = build_program(experiment, dataset, layout)
    return Job(
        experiment,
        dataset,
        layout,
        program.model,
        program.structure,
        program.state,
        layout.share(experiment.data.B),
        layout.feed(experiment.data.B),
        program.init,
        program.step,
        program.evaluate,
    )


def flatten_state(state: Any) -> dict[str, dict[str, Any]]:
    """A training state as groups of named arrays, as checkpoints keep it."""
    groups: dict[str, dict[str, Any]] = {}
    for group, tree in state.items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        groups[group] = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return groups


def unflatten_state(like: Any, groups: dict[str, dict[str, Any]]) -> Any:
    return {
        group: jax.tree.unflatten(jax.tree.structure(tree), list(_in_order(tree, groups[group])))
        for group, tree in like.items()
    }


def _in_order(tree: Any, named: dict[str, Any]) -> Any:
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        yield named[jax.tree_util.keystr(path, simple=True, separator="/")]


def load_model(run: Path | str, step: int | None = None) -> tuple[LanguageModel, Experiment, Dataset]:
    """The model of a run's newest whole checkpoint (or of the given step), its experiment and its data."""
    run = Path(run)
    experiment = settings.load(settings.locate(str(run)))
    model = jax.eval_shape(functools.partial(build_model, experiment), jax.random.key(0))
    params, structure = flatten(model)
    asked = {"params": params}
    if experiment.train.ema is not None:
        lazy = {name for name, spec in structure.specs.items() if spec.table and experiment.optimizer.lazy_tables}
        averages = {name: p for name, p in params.items() if name not in lazy}
        asked = {"ema": averages} | (asked if lazy else {})
    with Checkpoints(run / "checkpoints", writable=False) as checkpoints:
        found = checkpoints.restore(asked, step)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet: train it first, python train.py {run}")
    return structure.module(shown(found[1])), experiment, experiment.data.build()


@_one_line()
def describe(job: Job, console: Console, run: Path) -> dict[str, float]:
    """Prints the summary of a run; returns the figures that metrics need."""
    experiment, dataset = job.experiment, job.dataset
    flops = flops_per_token(experiment, job.structure, dataset.labelled, dataset.prefix > 0)
    T, B = experiment.data.T, experiment.data.B
    facts = {
        "parameters": f"{parameter_count(job.structure.specs):,}",
        "state": f"{state_bytes(job.model, T):,} bytes a sequence of {T} tokens",
        "compute": f"{flops / 1e6:,.2f} MFLOP a token and step, {flops * T * B / 1e9:,.1f} GFLOP a step",
        "data": f"{B} x {T} tokens a step, {dataset.words} words, digest {dataset.digest[:12]}",
        "steps": f"{experiment.train.steps:,} ({experiment.train.steps * B * T:,} tokens)",
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}, mesh "
        + job.layout.said
        + f", {processes.count()} processes" * (processes.count() > 1),
        **where(experiment, job.layout, job.structure.specs, job.state),
        "run": escape(str(run)),
    }
    show(console, experiment, job.model, job.structure, job.layout, facts)
    return {"flops": flops, "peak": peak_flops(job.layout.mesh) or 0.0}


class Outcome(dict):
    """How a run ended: `status` is "done", "stopped" (by a signal) or "diverged"; `evaluation`, `step`, `message`."""


def train(
    experiment: Experiment,
    run: Path,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    profile: str | None = None,
    hung: float = 0.0,
    console: Console | None = None,
) -> Outcome:
    """Trains, or goes on training, in a folder.

    resume: "auto" goes on where the folder has a run; "never" refuses such a folder; another run's folder is where a
        folder without a run begins (what it has of its own goes on as with "auto", so that the same command resumes).
    dry_run: stop after the summary; nothing is written, except that text becomes a token store in the cache.
    profile, hung: as for train.py (training/watch.py).

    Of several processes (training/processes.py) all call it with the same arguments; the first one speaks and writes.
    Its outcome alone has the model.

    Raises ConfigError, DataError or CheckpointError, each in one line.
    """
    began, first = time.time(), processes.first()
    profiler = Profiler(run, profile)
    console = (console or Console()) if first else Console(file=io.StringIO())
    meeting = processes.Meeting("run")
    source = source_of(run, resume)
    config = settings.render(experiment)
    job = prepare(experiment)
    _same_everywhere(meeting, config, job.dataset.digest)
    facts = describe(job, console, run)
    if dry_run:
        return Outcome(status="dry run", step=0)
    with RunLock(run) if first else contextlib.nullcontext() as lock:
        meeting.exchange()  # none begins before the folder is ours
        asked, lost = experiment.train, None if lock is None else lock.lost
        with (
            Stop() as stop,
            Checkpoints(
                run / "checkpoints", keep_last=asked.keep_last, keep_best=asked.keep_best, lost=lost
            ) as checkpoints,
            Log(run, tensorboard=asked.tensorboard, wandb=asked.wandb) if first else NoLog() as log,
            Watchdog(run, hung) as watchdog,
            profiler,
        ):
            state, start = _start(job, checkpoints, source, run, console)
            profiler.check(start, asked.steps)
            if first:
                _write_atomically(run / "config.py", config)
                if source not in (None, run) and (source / METRICS).is_file():
                    shutil.copyfile(source / METRICS, run / METRICS)
            times = Times(run, began) if first else None
            log.rewind(start)
            outcome = _loop(job, state, start, stop, checkpoints, log, facts, run, console, watchdog, profiler)
            if times is not None:
                outcome["goodput"] = times.end()
                console.print(str(outcome["goodput"]), markup=False, highlight=False)
            return outcome


def _loop(
    job: Job,
    state: Any,
    start: int,
    stop: Stop,
    checkpoints: Checkpoints,
    log: Log,
    facts: dict,
    run: Path,
    console: Console,
    watchdog: Watchdog,
    profiler: Profiler,
) -> Outcome:
    experiment, train = job.experiment, job.experiment.train
    tokens = experiment.data.B * experiment.data.T
    rate = learning_rate(experiment.optimizer.lr, experiment.optimizer.schedule, train.steps)
    source = job.dataset.train(train.seed, job.share)
    evaluation: dict[str, Any] = {}
    made: dict[int, Any] = {}  # whether a step was skipped, on the devices
    clock, counted, compiling, apart = time.perf_counter(), start, 0.0, 0.0

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        """What is done meanwhile takes no time of steps."""
        nonlocal apart
        jax.block_until_ready(state)
        began = time.perf_counter()
        yield
        apart += time.perf_counter() - began

    def read(step: int) -> Any:
        return job.feed(source[step])

    def held_out() -> Iterator[Any]:
        for batch in job.dataset.held_out(train.eval_batches, job.share):
            watchdog.beat(step)
            yield job.feed(batch)

    def tell_skipped(progress: Progress) -> None:
        """Of the steps that were made since it was last asked: to look at each would have the host wait for it."""
        for at, bad in zip(made, jax.device_get([*made.values()]), strict=True):
            if bad:
                batch = {"seed": train.seed, "batch": at - 1, "rows": job.dataset.places(train.seed, at - 1)}
                log.write(at, {"kind": "skipped", **batch})
                said = f"skipped: its loss or gradient is not finite (batch {at - 1} of seed {train.seed})"
                progress.print(f"step {at}/{train.steps}  {said}")
        made.clear()

    def save(step: int, progress: Progress, metric: float | None = None) -> None:
        tell_skipped(progress)
        checkpoints.save(step, flatten_state(state), record_of(experiment, job.dataset, step), metric)

    def judge(step: int, progress: Progress) -> dict[str, Any]:
        tell_skipped(progress)
        found = evaluate(job.evaluate, shown(state), held_out())
        log.write(step, {"kind": "eval", **found})
        said = "  ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
        progress.print(f"step {step}/{train.steps}  held out  {said}")
        return found

    def due(every: int, step: int) -> bool:
        return bool(every) and step % every == 0

    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        Progress(train.steps, start=start, console=console) as progress,
    ):
        step = start
        ahead = reader.submit(read, min(start, train.steps - 1))
        for step in range(start + 1, train.steps + 1):
            batch = ahead.result()
            if step < train.steps:
                ahead = reader.submit(read, step)
            profiler.before(step, state)
            called = time.perf_counter()
            state, metrics = job.step(state, batch)
            made[step] = metrics["bad"]
            if step == start + 1:
                compiling = time.perf_counter() - called
            if traced := profiler.after(step, state):
                progress.print(f"written: {traced}: steps {profiler.first} to {step}, for xprof or Perfetto")
            last = step == train.steps
            if logged := due(train.log_every, step) or last:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds = time.perf_counter() - clock - apart
                values["learning_rate"] = float(rate(step - 1))
                values["tokens"] = step * tokens
                values["seconds"], compiling = seconds - compiling, 0.0
                values["tokens_per_second"] = (step - counted) * tokens / seconds
                if facts["peak"]:
                    values["mfu"] = values["tokens_per_second"] * facts["flops"] / facts["peak"]
                del values["bad"]
                tell_skipped(progress)
                log.write(step, values)
                progress.update(step, **{name: values[name] for name in SHOWN if name in values})
                clock, counted, apart = time.perf_counter(), step, 0.0
            # Also between lines of the log, or a streak could come and go unseen.
            if (logged or due(train.bad_steps, step)) and (bad := int(metrics["bad"])) >= train.bad_steps:
                tell_skipped(progress)
                checkpoints.wait()
                kept = checkpoints.steps()
                good = f"the last good checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet"
                message = (
                    f"{bad} steps in a row had a non-finite loss or gradient: stopped at step {step}; {good}. "
                    "Try a lower optimizer.lr, in another --run"
                )
                return Outcome(status="diverged", step=step, message=message)
            metric = None
            if due(train.eval_every, step) or last:
                with aside():
                    evaluation = judge(step, progress)
                metric = evaluation["loss"]
            watchdog.beat(step)
            asked = stop.after(step)
            if due(train.checkpoint_every, step) or last or asked:
                with aside():
                    save(step, progress, metric)
            if asked and not last:
                checkpoints.wait()
                message = f"{asked}: saved step {step}. Continue with: {_command(run)}"
                return Outcome(status="stopped", step=step, signal=int(signal.Signals[asked]), message=message)
        checkpoints.wait()
    if start == train.steps:
        console.print(f"{run} is done: nothing is left to train", markup=False, highlight=False, soft_wrap=True)
        evaluation = evaluate(job.evaluate, shown(state), held_out())
    params: Params = shown(state)
    if processes.count() > 1:
        params = processes.whole(params)
    if job.layout.host:  # whoever is handed the model looks up tables on the device
        params = jax.device_put(params, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), params))
    model = job.structure.module(params) if params else None
    return Outcome(status="done", step=train.steps, evaluation=evaluation, model=model, dataset=job.dataset)


def _same_everywhere(meeting: processes.Meeting, config: str, digest: str) -> None:
    """Refuses processes that were called with other flags, or that see other data."""
    (first_config, first_data), *others = meeting.exchange([config, digest])
    for index, (other, data) in enumerate(others, 1):
        if data != first_data:
            raise DataError(f"process {index} has other data than process 0 ({data[:12]}, not {first_data[:12]})")
        if other != first_config:
            raise settings.ConfigError(f"process {index} was given another config or other flags: give all the same")


def _start(job: Job, checkpoints: Checkpoints, source: Path | None, run: Path, console: Console) -> tuple[Any, int]:
    """The state to begin with: of the newest whole checkpoint, or a new one."""
    found, accept = None, functools.partial(refuse_another, job.experiment, job.dataset, source)
    if source is not None:
        if source == run:
            found = checkpoints.restore(flatten_state(job.state), accept=accept)
        else:
            with Checkpoints(source / "checkpoints", writable=False) as other:
                found = other.restore(flatten_state(job.state), accept=accept)
            if found is None:
                raise CheckpointError(f"--resume {source}: it has no checkpoint")
    if found is None:
        return job.init(), 0
    step, groups, meta = found
    if step > job.experiment.train.steps:
        raise settings.ConfigError(
            f"train.steps is {job.experiment.train.steps}, but {source} is at step {step} already: give at least that"
        )
    console.print(f"resuming {source} from step {step}", markup=False, highlight=False, soft_wrap=True)
    for field, old, new in settings.changes(meta["config"], job.experiment):
        note = {"train.steps": "so does the learning-rate schedule"}.get(field)
        if field.startswith("mesh."):
            note = "the last digits may, too"
        if note:
            console.print(f"{field} changes from {old} to {new}: {note}", markup=False, highlight=False)
    return unflatten_state(job.state, groups), step


def _command(run: Path) -> str:
    return f"python train.py {shlex.quote(str(run))} --run {shlex.quote(str(run))}"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error
