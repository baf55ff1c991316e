"""What a run tells of its time: traces, steps that never end, and the share that counted."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from training import run as runs
from training.checkpoint import Checkpoints
from training.settings import ConfigError
from training.stop import Stop
from training.watch import HUNG, STACKS, TIMES, Goodput, Profiler, Times, goodput

pytestmark = pytest.mark.xdist_group("watch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("watch")


def test_a_trace_of_two_steps(folder):
    console = tiny.quiet()
    tiny.trained(folder, "traced", console=console, profile="3:4", train__steps=5)
    assert f"written: {folder}/traced/profile: steps 3 to 4" in console.file.getvalue()
    (trace,) = (folder / "traced" / "profile").rglob("perfetto_trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    calls = [event for event in events if event.get("name") == "PjitFunction(step)"]
    assert len(calls) >= 2  # a call may be told as a call in a call


@pytest.mark.parametrize("words", ["3", "4:3", "0:2", "a:b", ":", "-1:2"])
def test_steps_that_are_none(tmp_path, words):
    with pytest.raises(ConfigError, match=f"profile is '{words}': give the first and the last step") as caught:
        Profiler(tmp_path, words)
    assert "\n" not in str(caught.value)


def test_steps_that_are_not_left(folder):
    with pytest.raises(ConfigError, match="profile is '6:7', but steps 1 to 5 are left of this run: name some of"):
        tiny.trained(folder, "short", profile="6:7", train__steps=5)
    with pytest.raises(ConfigError, match="profile is '3:4', but no step is left of this run"):
        tiny.trained(folder, "traced", profile="3:4", train__steps=5)


def test_a_trace_that_the_run_does_not_see_the_end_of(folder):
    tiny.trained(folder, "cut", profile="4:9", train__steps=5)
    assert list((folder / "cut" / "profile").rglob("*.xplane.pb"))


STUCK = """
import sys, time
from training.data import TextDataset
batch = TextDataset.batch
def stuck(self, seed, step, rows=None):
    while step == 6:
        time.sleep(1)
    return batch(self, seed, step, rows)
TextDataset.batch = stuck
import train
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_step_that_never_ends(folder):
    config, run = tiny.config_file(folder), folder / "stuck"
    words = [sys.executable, "-c", STUCK, str(config), "--run", str(run), "--hung", "2"]
    ended = subprocess.run(words, cwd=tiny.ROOT, capture_output=True, text=True, timeout=200)
    assert ended.returncode == HUNG, ended.stderr
    said = f"error: no step has ended for 2 s since step 6: the stacks of its threads are in {run}/{STACKS}. "
    assert ended.stderr == said + "The same command goes on from the last checkpoint\n"
    assert " in stuck\n" in (run / STACKS).read_text()
    console = tiny.quiet()
    assert tiny.trained(folder, "stuck", console=console)["status"] == "done"
    assert "from step 4" in console.file.getvalue() and "2 starts, 1 cut short" in console.file.getvalue()


def test_a_process_that_was_suspended_does_not_hang(folder):
    config, run = tiny.config_file(folder), folder / "suspended"
    process = tiny.start(config, "--run", run, "--hung", "2", "--train.steps", "80", "--train.checkpoint_every", "0")
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said


def test_time_that_counts(tmp_path):
    """By hand: 10 seconds and killed, 20 and done; of steps 2 and 3 twice."""
    log = tmp_path / "metrics.jsonl"
    Times(tmp_path, 1000.0)
    log.write_text('{"step": 1, "seconds": 2.0}\n{"step": 2, "seconds": 2.0}\n')
    os.utime(log, (1010, 1010))
    times = Times(tmp_path, 2000.0)
    with log.open("a") as file:
        file.write('{"step": 3, "seconds": 8.0}\n{"step": 3, "kind": "eval", "loss": 1.0}\n')
    found = times.end()
    assert found.steps == 12 and (found.starts, found.cut) == (2, 1)
    lines = [json.loads(line) for line in (tmp_path / TIMES).read_text().splitlines()]
    assert lines[:3] == [{"from": 1000.0}, {"to": 1010.0, "cut": True}, {"from": 2000.0}]
    (tmp_path / TIMES).write_text("\n".join(map(json.dumps, [*lines[:3], {"to": 2020.0}])) + '\n{"fr')
    assert goodput(tmp_path) == Goodput(12.0, 30.0, 2, 1)
    assert str(goodput(tmp_path)) == "goodput 40%: 12 s of 30 s in steps that count (2 starts, 1 cut short)"
    assert str(Goodput(3000.0, 3600.0, 1, 0)) == "goodput 83%: 50 min of 60 min in steps that count (1 start)"


def test_steps_count_and_what_is_done_between_them_does_not(folder, monkeypatch):
    """By a clock that says 100 s a step, and 1000 s an evaluation or a save; that of the last step nobody reads."""
    now, late = time.perf_counter, [0.0]

    def lasts(owner, name, seconds):
        do = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (late.append(seconds), do(*a, **k))[1])

    monkeypatch.setattr(time, "perf_counter", lambda: now() + sum(late))
    lasts(Stop, "after", 100.0)
    lasts(Checkpoints, "save", 1000.0)
    lasts(runs, "evaluate", 1000.0)
    outcome = tiny.trained(folder, "slow", train__log_every=3)
    assert 1900 <= outcome["goodput"].steps < 2000


def test_compiling_does_not_count(folder):
    outcome = tiny.trained(folder, "counted")
    found = outcome["goodput"]
    assert 0 < found.steps < found.alive and (found.starts, found.cut) == (1, 0)
    again = tiny.trained(folder, "counted")["goodput"]  # done: nothing more counts
    assert again.steps == found.steps and again.starts == 2 and again.alive > found.alive
