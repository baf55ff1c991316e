"""What a study says on its way, and workers that are interrupted (what they train: tests/test_study.py)."""

import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from probes import ablation, workers
from probes.ablation import LEDGER, opened

ROOT = Path(__file__).parents[1]


def begun(tmp_path: Path, folder: Path) -> tuple[subprocess.Popen, Callable[[], list[Path]]]:
    """A study of two long cells, both under way; and what is saved of them."""
    study = tmp_path / "long.py"
    long = "dataclasses.replace(STUDY, base=replaced(BASE, 'train.steps', 400_000))"
    study.write_text(f"import dataclasses\n\nfrom test_study import *\n\ntiers = {{'laptop': {long}}}\n")
    command = [sys.executable, "ablate.py", str(study), "--folder", str(folder), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": "tests"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list((folder / ablation.UNFINISHED).glob("*/"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    time.sleep(5)
    return process, lambda: [p for p in (folder / ablation.UNFINISHED).glob("*/*") if p.name.isdigit()]


def test_programs_of_a_cell_are_never_side_by_side():
    """They would keep their state in one place."""
    one, other = (SimpleNamespace(digest=name) for name in "ab")
    waiting = [(one, [0]), (one, [1]), (other, [0])]
    team = [SimpleNamespace(one=None), SimpleNamespace(one=None)]
    team[0].one = workers._free(waiting, team)
    team[1].one = workers._free(waiting, team)
    assert [worker.one for worker in team] == [(one, [0]), (other, [0])] and waiting == [(one, [1])]
    team[1].one = None
    assert workers._free(waiting, team) is None
    team[0].one = None
    assert workers._free(waiting, team) == (one, [1]) and not waiting


def bar(out: io.StringIO, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> tuple[ablation.Bar, list]:
    """Of two programs of ten steps and two arms, one four times as large as the other; each look takes a second."""
    clock = itertools.count()
    monkeypatch.setattr(ablation, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    ones: list = []
    for name, flops in (("small", 1), ("large", 4)):
        experiment = SimpleNamespace(data=SimpleNamespace(T=1, B=1), train=SimpleNamespace(steps=10))
        cell = SimpleNamespace(name=name, experiment=experiment)
        ones.append((SimpleNamespace(digest=name, costs={"flops": flops}, cell=cell), [0, 1]))
    console = Console(file=out, width=100, force_terminal=terminal)
    return ablation.Bar(SimpleNamespace(console=console), ones, every=0), ones  # type: ignore[arg-type]


def test_a_study_says_where_it_is_without_a_terminal(monkeypatch):
    """Where its output is a file, as a scheduler's is, a line now and then: arms, the best so far, how long to go."""
    out = io.StringIO()
    shown, (small, large) = bar(out, monkeypatch, terminal=False)
    with shown:
        shown.told(small, 0, "small: compiles")
        shown.told(small, 5, "small: best 0.5 [at 0.01]")
        shown.done(small)  # at its goal: the five steps that it did not need are no part of what is left
        shown.told(large, 5, "large: goes on from step 5", True)
        shown.told(large, 0, "large: compiles")
        shown.told(large, 2, "large: best 0.7")
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "0/4 arms | small: compiles",
        "0/4 arms | small: best 0.5 [at 0.01]",
        "2/4 arms | large: goes on from step 5",
        "2/4 arms | large: compiles",
        "2/4 arms | large: best 0.7",
    ]
    # The smaller of the two is a fifth of it all, and the larger was half done.
    assert [line.split("  ")[1] for line in lines] == ["0%", "10%", "60%", "60%", "76%"]
    assert "eta" not in lines[0] and all("  eta 0:00:" in line for line in lines[1:])


def test_a_study_has_a_bar_on_a_terminal(monkeypatch):
    out = io.StringIO()
    shown, (small, _) = bar(out, monkeypatch, terminal=True)
    with shown:
        shown.told(small, 5, "small: best 0.5")
        shown._progress.refresh()
    assert "0/4 arms | small: best 0.5" in out.getvalue() and "10%" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL], ids=lambda kind: kind.name)
def test_workers_are_stopped_with_the_first_process(tmp_path, kind):
    """Their state is saved, also where the first process was killed."""
    folder = tmp_path / "out"
    process, saved = begun(tmp_path, folder)
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}[kind]
    for _ in range(100):
        if subprocess.run(["pgrep", "-f", f"probes.workers.*{folder}"], stdout=subprocess.DEVNULL).returncode:
            break
        time.sleep(0.2)
    assert len(saved()) == 2 and not opened(folder / LEDGER, writable=False).rows


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_the_others_save(tmp_path):
    folder = tmp_path / "out"
    process, saved = begun(tmp_path, folder)
    subprocess.run(["pkill", "-9", "-f", f"probes.workers 0.*{folder}"], check=True)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "its worker ended with signal 9, as when memory runs out" in error
    assert "error: 16: " in error or "error: 24: " in error
    assert len(saved()) >= 1 and not opened(folder / LEDGER, writable=False).rows
