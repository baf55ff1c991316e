"""The fault matrix, in one process: real files, real runs, faults drawn by the number of the trial.

Row by row as results/faults.md counts them; `make test-faults` runs all trials, `make test` the first few of each. Rows
that need processes of their own are in test_faults_processes.py.
"""

import dataclasses
import logging
import re
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from faults import (
    SIGNALS,
    SUMS,
    Fuse,
    bits,
    blank,
    copied,
    delete,
    files,
    flip,
    losses,
    newest,
    on_line,
    send,
    trials,
    truncate,
    whole_and_half,
)
from tiny import quiet, trained

from layers.linear import LinearAttention
from layers.mlp import MLP
from models.lm import LM, Stage
from training import run as runs
from training import settings
from training.checkpoint import CheckpointError, Checkpoints
from training.data import DataError
from training.faults import difference, last_arrays
from training.log import read
from training.settings import ConfigError

pytestmark = [
    pytest.mark.xdist_group("faults"),
    # of a save that a test made fail: tensorstore tells an event loop that has ended
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whole_and_half(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def half(folder, tmp_path):
    return copied(folder / "half", folder / tmp_path.name)


def ends_as_if_nothing_had_happened(folder: Path, run: Path, **changes) -> str:
    """Goes on to the end; what was said on the way."""
    console = quiet()
    assert trained(folder, run.name, console=console, **changes)["status"] == "done"
    assert difference(folder / "whole", run) is None
    return console.file.getvalue()


# 2, 3: signals.


@trials(2, 36)
def test_02_preemption(folder, trial):
    draw = np.random.default_rng(trial)
    step, kind = int(draw.integers(1, 20)), SIGNALS[trial % 3]
    run = folder / f"preempted {trial}"
    with on_line(step, lambda: send(kind)):
        outcome = trained(folder, run.name)
    assert (outcome["status"], outcome["step"], outcome["signal"]) == ("stopped", step, kind)
    assert newest(run).name == f"{step:08d}"
    ends_as_if_nothing_had_happened(folder, run)


@trials(1, 14)
def test_03_a_second_signal_while_saving(folder, trial, monkeypatch):
    draw = np.random.default_rng(trial)
    step, kind = int(draw.integers(1, 20)), SIGNALS[trial % 3]
    run, finish, sent = folder / f"twice {trial}", Checkpoints._finish, []

    def while_saving(self, at, *rest):
        if at == step and not sent:
            sent.append(kind)
            send(kind)
        finish(self, at, *rest)

    monkeypatch.setattr(Checkpoints, "_finish", while_saving)
    with on_line(step, lambda: send(kind)):
        outcome = trained(folder, run.name)
    assert sent and outcome["status"] == "stopped" and newest(run).name == f"{step:08d}"
    ends_as_if_nothing_had_happened(folder, run)


# 4, 5, 6: damage.


def passed_over(run: Path, path: Path, caplog) -> None:
    """The newest step is damaged: a warning names it and the file, and the step before comes back, to the bit."""
    with Checkpoints(run / "checkpoints", writable=False) as checkpoints:
        good = checkpoints.shapes(4)
        want = checkpoints.restore(good, 4)
        caplog.clear()
        found = checkpoints.restore(good)
    assert want is not None and found is not None and found[0] == 4 and bits(found[1]) == bits(want[1])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "step 8" in warning and "\n" not in warning
    assert path.name in warning or path.name == SUMS, warning


@trials(8, 400)
def test_04_rot(folder, half, trial, caplog):
    """Every file in turn; a bit, or a page of zeros."""
    draw = np.random.default_rng(trial)
    among = files(newest(half))
    path = among[trial % len(among)]
    (blank if trial % 3 == 2 else flip)(path, draw)
    passed_over(half, path, caplog)
    if trial % 40 == 0:
        assert "from step 4" in ends_as_if_nothing_had_happened(folder, half)
    shutil.rmtree(half)


@trials(6, 200)
def test_05_partial(folder, half, trial, caplog):
    draw = np.random.default_rng(trial)
    step = newest(half)
    among = files(step)
    kind = ("truncated", "missing", "no list", "empty", "leftover")[trial % 5]
    path = among[int(draw.integers(len(among)))]
    if kind == "truncated":
        truncate(path, draw)
    elif kind == "missing":
        delete(path, draw)
    elif kind == "no list":
        path = step / SUMS
        path.unlink()
    if kind in ("truncated", "missing", "no list"):
        passed_over(half, path, caplog)
    elif kind == "empty":
        shutil.rmtree(step)
        step.mkdir()
    else:
        step.rename(step.with_name(f"tmp-{step.name}-1"))
    if kind in ("empty", "leftover") or trial % 20 == 0:
        assert "from step 4" in ends_as_if_nothing_had_happened(folder, half)
        assert all(p.name.isdigit() for p in (half / "checkpoints").iterdir())
    shutil.rmtree(half)


@trials(1, 10)
def test_06_all_steps_bad(folder, half, trial):
    draw = np.random.default_rng(trial)
    for step in (half / "checkpoints").iterdir():
        among = files(step)
        (flip, truncate, delete)[trial % 3](among[int(draw.integers(len(among)))], draw)
    before = {path: path.read_bytes() for path in files(half)}
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(steps 4, 8\)") as caught:
        trained(folder, half.name)
    assert "\n" not in str(caught.value)
    left = {path: path.read_bytes() for path in files(half)}
    left.pop(half / "lock", None), before.pop(half / "lock", None)
    assert left == before


# 9: another config.

# What a run may go on with; all else would make it another run.
ALLOWED = (
    "description", "parameters", "sample", "data.store", "mesh", "model.remat", "model.scan_layers", "train.steps",
    "train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every", "train.bad_steps",
    "train.keep_last", "train.keep_best", "train.tensorboard", "train.wandb",
)  # fmt: skip
OTHER = {"model.remat": "block", "model.dtype": "bfloat16", "model.scan_layers": "never", "mesh.data": 2}


def edits(config, path: str = ""):
    """(field, another value) of every field that has a plain one."""
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from edits(value, name + ".")
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                yield from edits(part, f"{name}.{i}.") if dataclasses.is_dataclass(part) else ()
        elif name in OTHER:
            yield name, OTHER[name]
        elif isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int):
            yield name, 2 * value or 1
        elif isinstance(value, float):
            yield name, value / 2 or 0.25
        elif isinstance(value, str) and field.name not in ("source",):
            yield name, value + "x"


@trials(20, 60)
def test_09_an_edited_config(folder, half, trial):
    made = tiny.experiment(folder)
    every = list(edits(made))
    name, value = every[(7 * trial) % len(every)]
    lines = (half / "metrics.jsonl").read_bytes()
    try:
        changed = settings.replaced(made, name, value)
    except ConfigError as error:
        assert name.rpartition(".")[2] in str(error) and "\n" not in str(error)
        return
    if name.startswith(ALLOWED):
        assert runs.train(changed, half, console=quiet())["status"] == "done"
        assert settings.load(half / "config.py") == changed
        want = losses(folder / "whole")
        for step, loss in losses(half).items():
            assert step not in want or abs(loss / want[step] - 1) < 1e-5
        return
    with pytest.raises((ConfigError, DataError, CheckpointError)) as caught:
        runs.train(changed, half, console=quiet())
    said = str(caught.value)
    assert name.rpartition(".")[2] in said and "\n" not in said, said
    assert (half / "metrics.jsonl").read_bytes() == lines and newest(half).name == "00000008"


# 11: numbers.


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A corpus of which few batches hold a Z."""
    folder = tmp_path_factory.mktemp("fused")
    tiny.corpus(folder)
    for path in sorted((folder / "text").iterdir()):
        text = path.read_text()
        path.write_text("".join(c + "Z" * (i % 90 == 50) for i, c in enumerate(text)))
    return folder


SPOILT = [
    (kind, times) for kind in ("value", "gradient", "state") for times in (float("nan"), float("inf"), -float("inf"))
]


@trials(2, 60)
def test_11_numbers_that_are_not(fused, trial, monkeypatch):
    """Steps of batches that spoil the numbers change nothing, and all others are as if those had not been."""
    kind, times = SPOILT[trial % len(SPOILT)]
    (token,) = tiny.experiment(fused).data.build().encode("Z")

    layers = (LinearAttention(H=2, K=4, V=8), Fuse(int(token), kind, times), MLP())
    model = LM(W=257, D=16, stages=(Stage(layers),))
    made = tiny.experiment(fused, model=model, train__seed=trial // len(SPOILT), train__eval_every=0)
    monkeypatch.setattr(settings, "render", lambda experiment: "")  # a layer of the tests has no place in a config
    job = runs.prepare(made)
    state, bad = job.init(), []
    for step in range(made.train.steps):
        batch = job.dataset.batch(made.train.seed, step)
        if (batch.ids_BT == token).any():
            bad.append(step)
        else:
            state, metrics = job.step(state, job.feed(batch))
            assert int(metrics["bad"]) == 0
    run = fused / f"{trial}"
    console = quiet()
    outcome = runs.train(made, run, console=console)
    lines = [line for line in read(run) if "kind" not in line]
    if kind == "gradient":
        assert all(np.isfinite(line["loss"]) for line in lines)
    assert outcome["status"] == "done" and lines[-1]["skipped"] == len(bad) > 0
    skipped = [
        a["step"] - 1 for a, b in zip(lines, [{"skipped": 0}, *lines], strict=False) if a["skipped"] > b["skipped"]
    ]
    assert skipped == bad
    told = [line for line in read(run) if line.get("kind") == "skipped"]
    assert [line["batch"] for line in told] == bad == [line["step"] - 1 for line in told]
    for line in told:
        ids_BT = job.dataset.batch(line["seed"], line["batch"]).ids_BT
        assert (ids_BT == token).any() and (ids_BT[:, 0] == job.dataset.store.train[line["rows"]]).all()
        said = f"skipped: its loss or gradient is not finite (batch {line['batch']} of seed {made.train.seed})"
        assert f"step {line['step']}/20  {said}\n" in console.file.getvalue()
    _, found = last_arrays(run)
    for name, x in jax.device_get(state["params"]).items():
        assert x.tobytes() == found[f"params/{name}"].tobytes(), name
    shutil.rmtree(run)


# 17: the clock.


@trials(1, 10)
def test_17_a_clock_that_jumps(folder, trial, monkeypatch):
    draw, run = np.random.default_rng(trial), folder / f"jumped {trial}"
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    with on_line(int(draw.integers(1, 19)), lambda: shift.__setitem__(0, (-1) ** trial * 86_400.0)):
        outcome = trained(folder, run.name)
    assert outcome["status"] == "done" and difference(folder / "whole", run) is None
    assert re.fullmatch(r"goodput (\d+%|-): .*", str(outcome["goodput"])), outcome["goodput"]
