"""Runs: stopped, killed and starved at awkward moments, they go on as if nothing had happened."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny
from faults import on_line, send, signed_anew
from tiny import ROOT, config_file, quiet, trained

from training import run as runs
from training.checkpoint import CheckpointError
from training.digests import META, DamagedError
from training.faults import difference, look, survive
from training.lock import RunLock
from training.log import read
from training.resume import refuse_another
from training.settings import ConfigError, load, render

pytestmark = pytest.mark.xdist_group("runs")  # one worker: the undisturbed runs are trained once
LONG = {"train__steps": 300, "train__checkpoint_every": 20, "train__eval_every": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `whole`, a run that nothing disturbed; copy what you change."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder, "whole")
    return folder


@pytest.fixture(scope="module")
def long(folder):
    """A longer run that nothing disturbed, to be compared with processes that were."""
    trained(folder, "long", **LONG)
    return folder / "long"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the run `whole`, stopped at step 8: checkpoints 4 and 8."""
    run = folder / tmp_path.name
    signal_at(8, signal.SIGTERM, lambda: trained(folder, run.name))
    return run


def signal_at(step: int, kind: signal.Signals, train) -> runs.Outcome:
    """Trains, and sends the signal to this very process when the step has been logged."""
    with on_line(step, lambda: send(kind)):
        return train()


def test_a_run_leaves_what_it_promises(folder):
    run = folder / "whole"
    lines = read(run)
    assert tiny.steps(run) == [*range(1, 21)]
    assert [line["step"] for line in lines if line.get("kind") == "eval"] == [5, 10, 15, 20]
    assert {"step", "loss", "bits_per_byte", "accuracy", "grad_norm", "learning_rate", "tokens_per_second"} <= set(
        lines[0]
    )
    assert load(run / "config.py") == tiny.experiment(folder)
    model, _, dataset = runs.load_model(run)
    assert model.config.D == 16 and dataset.words == 257


def test_a_run_that_is_done_is_not_trained_again(folder, monkeypatch):
    before = (folder / "whole" / "metrics.jsonl").read_bytes()
    console = quiet()
    monkeypatch.setattr(runs.Job, "step", None, raising=False)  # nobody may step
    outcome = trained(folder, "whole", console=console)
    assert outcome["status"] == "done" and outcome["step"] == 20
    assert outcome["evaluation"]["loss"] == read(folder / "whole")[-1]["loss"]
    assert "is done: nothing is left to train" in console.file.getvalue()
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "step"),
    # At the first step, at a checkpoint, at an evaluation.
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 8, marks=pytest.mark.slow), (signal.SIGUSR1, 10)],
    ids=str,
)
def test_a_signal_saves_and_the_rest_is_identical(folder, kind, step):
    name = f"{kind.name}{step}"
    outcome = signal_at(step, kind, lambda: trained(folder, name))
    assert outcome["status"] == "stopped" and outcome["step"] == step and outcome["signal"] == kind
    assert f"{kind.name}: saved step {step}" in outcome["message"]
    console = quiet()
    assert trained(folder, name, console=console)["status"] == "done"
    assert f"from step {step}" in console.file.getvalue()
    assert difference(folder / "whole", folder / name) is None


def test_killed_and_resumed_is_identical(folder, long):
    """In a process of its own, by SIGKILL, somewhere after a checkpoint; `slow` has the rest."""
    config, run = config_file(folder, **LONG), folder / "killed"
    process = tiny.start(config, "--run", run)
    while process.poll() is None and look(run, set()).step < 45:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = look(run, set())
    assert left.checkpoint in range(20, 300, 20) and left.step < 300
    trained(folder, "killed", **LONG)
    assert difference(long, run) is None


def test_sigterm_to_a_process_and_the_command_it_gives(folder, long, tmp_path):
    """What a scheduler does, and what a user pastes: the flags of the first command hold for the second."""
    config, run = config_file(folder), folder / "a run's folder"
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in LONG.items()]
    stopped(tmp_path, config, run, signal.SIGTERM, *flags)
    assert load(run / "config.py") == tiny.experiment(folder, **LONG)
    assert difference(long, run) is None


def stopped(tmp_path: Path, config: Path, run: Path, kind: signal.Signals, *flags: str) -> None:
    """Starts a run, signals it, checks how it leaves, and pastes the command it gives."""
    process = tiny.start(config, "--run", run, *flags)
    while process.poll() is None and look(run, set()).step < 30:
        time.sleep(0.001)
    process.send_signal(kind)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 128 + kind, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"{kind.name}: saved step ") and "Traceback" not in said
    command = last.partition("Continue with: ")[2]
    assert command == f"python train.py {shlex.quote(str(run))} --run {shlex.quote(str(run))}"

    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    again = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout and "written:" in again.stdout


# Going on, or not.


def test_a_changed_config_is_refused_with_both_values(folder):
    for change, text in {
        "model__D": r"model\.D = 16, not 32",
        "optimizer__lr": r"optimizer\.lr = 0\.01, not 32",
        "data__T": r"data\.T = 16, not 32",
        "train__seed": r"train\.seed = 0, not 32",
        "train__clip": r"train\.clip = 1\.0, not 32",
    }.items():
        with pytest.raises(ConfigError, match=f"whole was made with {text}: change that back, or choose another --run"):
            trained(folder, "whole", **{change: 32})


def test_what_a_run_was_made_with_its_checkpoints_say(folder):
    """And not config.py, which may have been edited, or be gone."""
    run = folder / "edited"
    shutil.copytree(folder / "whole", run)
    changed = tiny.experiment(folder, optimizer__lr=0.02, train__seed=1, train__steps=22)
    (run / "config.py").write_text(render(changed))
    text = r"edited was made with optimizer\.lr = 0\.01, not 0\.02, train\.seed = 0, not 1: change that back, or"
    with pytest.raises(ConfigError, match=text):
        runs.train(load(run / "config.py"), run, console=quiet())
    (run / "config.py").unlink()
    with pytest.raises(ConfigError, match=text):
        runs.train(changed, run, console=quiet())


def test_what_a_checkpoint_does_not_say_is_damage(folder, caplog):
    run, made = folder / "silent", tiny.experiment(folder)
    shutil.copytree(folder / "whole", run)
    newest = run / "checkpoints" / "00000020"
    record = json.loads((newest / META).read_text())
    for broken in ({"config": None}, {"config": "?"}, {"digest": None}, {"constants": 3}, {"constants": {"a": 3}}):
        meta = {name: value for name, value in {**record["meta"], **broken}.items() if value is not None}
        with pytest.raises(DamagedError, match=f"{META} does not say what its run was made of"):
            refuse_another(made, made.data.build(), run, 20, meta)
    del record["meta"]["digest"]
    (newest / META).write_text(json.dumps(record))
    signed_anew(newest)
    console = quiet()
    assert trained(folder, "silent", console=console)["status"] == "done"
    assert f"step 20 in {run}/checkpoints is damaged: {META} does not say what its run was made of" in caplog.text
    assert "from step 16" in console.file.getvalue() and difference(folder / "whole", run) is None


def test_what_may_change_does(copy, folder):
    console = quiet()
    outcome = trained(folder, copy.name, console=console, train__steps=22, train__log_every=2, description="Other.")
    assert outcome["status"] == "done" and outcome["step"] == 22
    assert tiny.steps(copy) == [*range(1, 9), *range(10, 23, 2)]
    assert "train.steps changes from 20 to 22" in console.file.getvalue()
    assert load(copy / "config.py").train.steps == 22
    with pytest.raises(ConfigError, match="train.steps is 10, but .* is at step 22 already"):
        trained(folder, copy.name, train__steps=10)
    assert load(copy / "config.py").train.steps == 22  # a refusal changes nothing


def test_a_config_without_a_checkpoint_binds_nobody(folder):
    """Nor does a signal after the last step; and the comparison that all this rests on sees the other seed."""
    run = folder / "begun"
    run.mkdir()
    shutil.copy(folder / "whole" / "config.py", run)
    shutil.copy(folder / "whole" / "metrics.jsonl", run)
    outcome = signal_at(20, signal.SIGTERM, lambda: trained(folder, "begun", train__seed=1))
    assert outcome["status"] == "done"
    assert tiny.steps(run) == [*range(1, 21)]
    assert "metrics.jsonl: {'step': 1" in difference(folder / "whole", run)
    shutil.copy(folder / "whole" / "metrics.jsonl", run)
    assert "differs" in difference(folder / "whole", run)


def test_a_changed_corpus_is_refused(tmp_path, folder):
    signal_at(8, signal.SIGTERM, lambda: trained(tmp_path, "run"))
    (tmp_path / "text" / "3.txt").write_text("other text, and so another digest\n" * 10)
    place = rf"\(digest \w+, now \w+ of the store {tmp_path}/store/text-\w+, made from {tmp_path}/text\)"
    with pytest.raises(CheckpointError, match=f"data has changed since step 8 was saved {place}: .*another --run"):
        trained(tmp_path, "run")


def test_a_truncated_checkpoint_is_passed_over_by_name(copy, folder, caplog):
    whole = max(
        (p for p in (copy / "checkpoints" / "00000008").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    with open(whole, "r+b") as file:
        file.truncate(whole.stat().st_size // 2)
    console = quiet()
    trained(folder, copy.name, console=console)
    warning = next(record.getMessage() for record in caplog.records if "damaged" in record.getMessage())
    assert "checkpoint of step 8" in warning and "\n" not in warning
    assert "from step 4" in console.file.getvalue()
    assert difference(folder / "whole", copy) is None


def test_never_and_another_run(copy, folder):
    with pytest.raises(CheckpointError, match="already holds a run: use --resume auto"):
        trained(folder, copy.name, resume="never")
    with pytest.raises(CheckpointError, match="--resume nowhere: give auto, never, or the folder of a run"):
        trained(folder, "new", resume="nowhere")
    # Begun from another run's checkpoint, stopped, and continued by the same command: not begun anew.
    new = copy.name + "-new"
    outcome = signal_at(14, signal.SIGTERM, lambda: trained(folder, new, resume=str(copy)))
    assert outcome["status"] == "stopped"
    console = quiet()
    trained(folder, new, resume=str(copy), console=console)
    assert f"resuming {folder / new} from step 14" in console.file.getvalue()
    assert difference(folder / "whole", folder / new) is None  # the lines of the first eight steps came along
    assert tiny.steps(copy) == [*range(1, 9)]  # and the other run is as it was


def test_a_folder_in_use(folder):
    with RunLock(folder / "whole"), pytest.raises(CheckpointError, match="whole is in use by process") as caught:
        trained(folder, "whole")
    assert "\n" not in str(caught.value)


def test_a_folder_that_another_host_took_over(copy, folder):
    other = json.dumps({"pid": 7, "host": "elsewhere", "born": "1"})
    said = f"step 12 was not saved in {copy}/checkpoints: {copy} was taken over by process 7 on elsewhere"
    with on_line(9, lambda: (copy / "lock").write_text(other)), pytest.raises(CheckpointError, match=said):
        trained(folder, copy.name)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["00000004", "00000008"]
    assert (copy / "lock").read_text() == other


def test_folders_that_cannot_be_written(copy, folder):
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot lock .*file") as caught:
        trained(folder, "file")
    assert "\n" not in str(caught.value)
    (folder / "blocked").mkdir()
    (folder / "blocked" / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints in .*blocked/checkpoints: File exists"):
        trained(folder, "blocked")
    # Orbax would write there, and could not read it again.
    with pytest.raises(CheckpointError, match=r"no checkpoints can be kept in .*: choose a path without \["):
        trained(folder, "run [1]")


def test_a_full_disk_is_one_error_and_costs_no_checkpoint(copy, folder):
    """A process whose files may not grow beyond 15 kB: the list of a checkpoint's arrays needs more, however orbax
    spreads the arrays themselves over files, and all else that a run writes needs less."""
    config = config_file(folder)
    done = tiny.run(config, "--run", copy, largest_file=15_000)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: step 12 was not saved in {copy / 'checkpoints'}: File too large (earlier checkpoints, untouched: 4, 8)"
    )
    assert "Traceback" not in done.stderr
    trained(folder, copy.name)
    assert difference(folder / "whole", copy) is None


def test_a_loss_that_is_not_finite(folder):
    outcome = trained(folder, "diverged", optimizer__lr=1e38, train__clip=None, train__bad_steps=6, train__log_every=5)
    assert outcome["status"] == "diverged" and outcome["step"] < 20
    said = outcome["message"]
    streak = int(said.split()[0])
    assert "steps in a row had a non-finite loss or gradient" in said and "\n" not in said
    skipped = [line["step"] for line in read(folder / "diverged") if line.get("kind") == "skipped"]
    assert 6 <= streak < 12 and skipped == [*range(outcome["step"] - streak + 1, outcome["step"] + 1)]
    kept = [int(p.name) for p in (folder / "diverged" / "checkpoints").iterdir()]
    assert f"the last good checkpoint is of step {max(kept)}" in said
    model = runs.load_model(folder / "diverged")[0]
    assert all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGUSR1], ids=str)
def test_other_signals_to_a_process(folder, long, tmp_path, kind):
    config, run = config_file(folder, **LONG), folder / kind.name
    stopped(tmp_path, config, run, kind)
    assert difference(long, run) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_is_identical(folder, tmp_path, seed):
    """Cosine schedule, EMA, gradients in two parts, TensorBoard: all that has a state."""
    config = config_file(
        folder, **LONG, optimizer__schedule=tiny.Schedule(warmup=50), train__ema=0.9, train__accumulate=2,
        train__eval_batches=None, train__tensorboard=True, sample="abc",
    )  # fmt: skip
    struck, found = survive([str(config)], tmp_path, kills=5, seed=seed)
    assert found is None
    assert struck == 5
