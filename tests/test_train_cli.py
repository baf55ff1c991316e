"""The door: help that costs nothing, flags for every field, and what a first run leaves to look at."""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import train
from training import settings
from training.experiment import AdamW, Experiment, Muon, Train
from training.flags import Options, field_helps, flags, parse

LIGHT = """import sys, train
code = train.main(sys.argv[1:])
heavy = {"jax", "flax", "numpy", "tyro", "orbax", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)"""


def test_help_is_light():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", LIGHT, "--help"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5  # seconds of CPU
    for name, path in settings.config_files().items():
        assert f"  {name} " in done.stdout
        assert settings.describe(path) and settings.describe(path) in done.stdout


def test_a_broken_config_does_not_hide_the_others(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("config = = 1")
    assert settings.describe(broken).startswith("(cannot be read: ")


def test_help_of_a_config_says_what_every_field_is(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["quickstart", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    experiment = settings.load(settings.locate("quickstart"))
    for flag in flags(experiment):
        last = flag.rpartition(".")[2]
        if not last.startswith("no_"):
            assert f"--{flag.replace('_', '-')}" in said
    text = " ".join(said.replace("│", " ").split())
    assert "--model.D INT width (default: 192)" in text
    assert "GatedDeltaNet: " in text and "Muon: Muon (orthogonalised momentum" in text
    assert "--train.clip {None}|FLOAT largest norm of the gradient; None for no clipping (default: 1.0)" in text
    assert "--resume STR auto: go on where the folder has a run;" in text


def parsed(*arguments: str) -> Experiment:
    experiment = settings.load(settings.locate("quickstart"))
    return parse(Options(experiment, Path("runs/quickstart")), arguments, program="train.py").experiment


def test_flags_change_their_field_and_no_other():
    before = parsed()
    assert before == settings.load(settings.locate("quickstart"))
    for arguments, field, value in [
        (["--train.log_every", "3"], "train.log_every", 3),
        (["--train.log-every", "3"], "train.log_every", 3),
        (["--train.checkpoint_every=7"], "train.checkpoint_every", 7),
        (["--train.eval_every", "9"], "train.eval_every", 9),
        (["--train.steps", "11"], "train.steps", 11),
        (["--model.stages.0.pattern.0.chunk", "32"], "model.stages.0.pattern.0.chunk", 32),
        (["--model.stages.0.repeats", "3"], "model.stages.0.repeats", 3),
        (["--optimizer.lr", "0.5"], "optimizer.lr", 0.5),
        (["--optimizer.schedule.shape", "cosine"], "optimizer.schedule.shape", "cosine"),
        (["--train.no_tensorboard"], "train.tensorboard", False),
        (["--train.clip", "None"], "train.clip", None),
        (["--train.ema", "0.99"], "train.ema", 0.99),
    ]:
        found = settings.differences(before, parsed(*arguments))
        assert [(name, new) for name, _, new in found] == [(field, value)], arguments


def test_the_chosen_optimizer_keeps_its_flags():
    assert isinstance(parsed().optimizer, Muon)
    tiny_one = dataclasses.replace(parsed(), optimizer=AdamW())
    options = parse(Options(tiny_one, Path("runs/a")), ["--optimizer.eps", "1e-6", "--run", "x"], program="train.py")
    assert options == Options(dataclasses.replace(tiny_one, optimizer=AdamW(eps=1e-6)), Path("x"))


def test_docstrings_are_read_field_by_field():
    helps = field_helps(Train)
    assert helps["steps"] == "optimiser steps"
    assert helps["log_every"] == helps["eval_every"] and helps["log_every"].startswith("in steps; 0 for never")
    assert "seed" in helps and "B" not in helps


def test_a_saved_config_is_the_config(tmp_path):
    made = tiny.experiment(tmp_path, description='A "quoted"\\ one.\n', sample='"""\\', model__softcap=float("inf"))
    (tmp_path / "config.py").write_text(settings.render(made))
    assert settings.load(tmp_path / "config.py") == made


def test_dry_run_stops_after_the_summary(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny.config_file(tmp_path)
    assert train.main([str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "LinearAttention" in said and "12,112" in said and "step 1/" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "text", "tiny.py"]


def test_from_the_first_run_to_one_that_is_done(tmp_path, monkeypatch, capsys):
    """In this process: everything that `make train` leaves, and what a second call says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.report.SAMPLE_TOKENS", 32)
    config = tiny.config_file(tmp_path, sample="ab", train__steps=8)
    assert train.main([str(config)]) == 0
    run = tmp_path / "runs" / "tiny"
    first = capsys.readouterr().out
    for name in (
        "figures/loss.png",
        "figures/position.png",
        "samples.txt",
        "recall.jsonl",
        "config.py",
        "metrics.jsonl",
    ):
        assert (run / name).stat().st_size > 0
    assert (run / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    heading, _, text = (run / "samples.txt").read_text().split("\n", 2)
    assert heading == "step 8, temperature 0.7" and text.startswith("ab") and len(text.encode()) > 2 + 16
    assert "order-0" in first and "tiny, step 8" in first and "written: runs/tiny/figures/loss.png" in first
    assert all(c.isprintable() or c in "\n\t" for c in first)
    metrics = (run / "metrics.jsonl").read_bytes()

    monkeypatch.chdir(run.parent)  # where the folder alone names the run
    assert train.main(["tiny"]) == 0
    again = capsys.readouterr().out
    assert "tiny is done: nothing is left to train" in again and "step 1/8" not in again
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in run.parent.iterdir()) == ["tiny"]

    shutil.rmtree(run / "figures")
    (run / "figures").write_text("")
    assert train.main(["tiny"]) == 2
    assert capsys.readouterr().err == "error: File exists: tiny/figures\n"


@pytest.mark.slow
def test_the_fault_command(tmp_path):
    """What the README shows, on a config of its own."""
    config = tiny.config_file(tmp_path, train__steps=200)
    command = [sys.executable, "-m", "training.faults", str(config), "--kills", "2", "--train.checkpoint_every", "20"]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "after 2 kills: 240 lines of metrics and" in done.stdout
    assert "arrays are the same to the last bit" in done.stdout
