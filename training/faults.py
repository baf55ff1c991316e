"""Kills a run with SIGKILL at random moments, goes on each time by the same command, and compares the outcome.

    python -m training.faults CONFIG [--kills 5] [--seed 0] [--folder FOLDER] [--field value ...]

The config is trained twice: once undisturbed, once killed. Every line of metrics.jsonl, wall-clock figures left out,
and every array of the last checkpoint (parameters, optimiser, counters) must be the same to the last bit. Ends with 0
if they are, with 1 and the first difference if not.
"""

import argparse
import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from training.checkpoint import Checkpoints
from training.log import METRICS, read

ROOT = Path(__file__).resolve().parent.parent
WALL_CLOCK = ("seconds", "tokens_per_second", "mfu")
MOMENTS = ("start", "step", "save", "evaluation", "restore")  # what a kill aims at; what it hit, the remains tell
POLL_SECONDS = 0.001


@dataclasses.dataclass
class Remains:
    """What a run folder shows of the process that wrote it."""

    log: int  # which file the log is: a run that goes on writes a new one
    step: int  # of the last line
    evaluating: bool  # a step was logged at which an evaluation is due, and the evaluation was not
    saving: bool
    checkpoint: int | None  # the newest whole one

    def since(self, before: "Remains") -> str:
        """What the process was at that left this where it had found `before`."""
        if self.log in (0, before.log):
            return "while starting"
        if self.step == (before.checkpoint or 0):
            return "before its first new step"
        doing = " and".join([" while evaluating"] * self.evaluating + [" while saving"] * self.saving)
        return f"after step {self.step}{doing}"


def look(run: Path, evaluations: set[int]) -> Remains:
    """evaluations: the steps at which an undisturbed run evaluates."""
    log = (run / METRICS).stat().st_ino if (run / METRICS).exists() else 0
    last = [{"step": 0}, *read(run)][-1]
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit()]
    pending = last["step"] in evaluations and last.get("kind") != "eval"
    saving = any(name.startswith("tmp-") for name in names)
    return Remains(log, last["step"], pending, saving, max(steps, default=None))


def start(arguments: Sequence[str], run: Path) -> subprocess.Popen:
    """A training process; what it says is appended to `run`.txt."""
    with open(run.with_suffix(".txt"), "ab") as said:
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--run", str(run)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)


def finish(process: subprocess.Popen, run: Path) -> None:
    if code := process.wait():
        raise RuntimeError(f"train.py ended with {code}:\n" + run.with_suffix(".txt").read_text()[-2000:])


def survive(
    arguments: Sequence[str], folder: Path, kills: int, seed: int, say: Callable[[str], None] = print
) -> tuple[int, str | None]:
    """Trains undisturbed in folder/whole and killed in folder/killed. Returns (kills that struck, first difference)."""
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    process = start(arguments, whole)
    while process.poll() is None and not look(whole, set()).step:
        time.sleep(POLL_SECONDS)
    starting = time.monotonic() - began
    finish(process, whole)
    lines = read(whole)
    evaluations = {line["step"] for line in lines if line.get("kind") == "eval"}
    last = lines[-1]["step"]
    say(f"undisturbed: {last} steps, {len(lines)} lines, {time.monotonic() - began:.1f} s")

    draw = random.Random(seed)
    aims = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
    draw.shuffle(aims)
    struck = 0
    # Not in the last quarter: the next save or evaluation must come before the end.
    targets = sorted(draw.choices(range(1, max(2, last * 3 // 4)), k=kills))
    for aim, step in zip(aims, targets, strict=True):
        if aim == "evaluation" and not any(step <= evaluation < last for evaluation in evaluations):
            aim = "step"
        began, before = time.monotonic(), look(killed, evaluations)
        if aim == "restore" and before.checkpoint is None:
            aim = "start"
        if not strike(start(arguments, killed), killed, aim, step, evaluations, starting, draw):
            break  # it came to its end first
        struck += 1
        seen = look(killed, evaluations)
        kept = "no checkpoint" if seen.checkpoint is None else f"checkpoint of step {seen.checkpoint}"
        say(f"kill {struck}: {time.monotonic() - began:5.1f} s after the start, {seen.since(before)}; left: {kept}")
    finish(start(arguments, killed), killed)
    return struck, difference(whole, killed)


def strike(
    process: subprocess.Popen,
    run: Path,
    aim: str,
    step: int,
    evaluations: set[int],
    starting: float,
    draw: random.Random,
) -> bool:
    """Kills a process that trains: at a moment of MOMENTS, from a step on. Whether it was still there to be killed.

    starting: seconds until a first step, of which the moment "start" is one.
    """
    until = time.monotonic() + draw.uniform(0, starting)
    before = look(run, evaluations)
    while process.poll() is None:
        seen = look(run, evaluations)
        reached = seen.step >= step and seen.log != before.log
        if {
            "start": time.monotonic() >= until,
            "step": reached,
            "save": reached and seen.saving,
            "evaluation": reached and seen.evaluating,
            # It is seen to read a handful of times: list, record, arrays.
            "restore": reads(process.pid, run / "checkpoints") and draw.random() < 0.3 or reached,
        }[aim]:
            time.sleep(draw.uniform(0, 0.005))
            break
        time.sleep(POLL_SECONDS)
    process.kill()
    return process.wait() != 0


def reads(pid: int, folder: Path) -> bool:
    """Whether a process has a file in a folder open, where the system tells (Linux does, in /proc)."""
    folder = folder.resolve()  # as the system names what is open
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed by now
            if link.readlink().is_relative_to(folder):
                return True
    return False


def difference(a: Path, b: Path) -> str | None:
    """The first difference of two runs: in their metrics, else in the arrays of their last checkpoints."""
    lines_a, lines_b = (
        [{name: value for name, value in line.items() if name not in WALL_CLOCK} for line in read(run)]
        for run in (a, b)
    )
    for line_a, line_b in zip(lines_a, lines_b, strict=False):
        if repr(line_a) != repr(line_b):  # a NaN is equal to itself here
            return f"{METRICS}: {line_a} and {line_b}"
    if len(lines_a) != len(lines_b):
        return f"{METRICS}: {len(lines_a)} and {len(lines_b)} lines"
    (step_a, arrays_a), (step_b, arrays_b) = last_arrays(a), last_arrays(b)
    if step_a != step_b or arrays_a.keys() != arrays_b.keys():
        return f"checkpoints: of steps {step_a} and {step_b}, {len(arrays_a)} and {len(arrays_b)} arrays"
    for name, x in arrays_a.items():
        y = arrays_b[name]
        if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
            return f"checkpoints: {name} differs"
    return None


def last_arrays(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The step of the newest checkpoint, and its arrays by group and name."""
    with Checkpoints(run / "checkpoints", writable=False) as checkpoints:
        found = checkpoints.restore(checkpoints.shapes())
    if found is None:
        raise RuntimeError(f"{run} has no checkpoint")
    step, groups, _ = found
    arrays = {f"{group}/{name}": x for group, named in groups.items() for name, x in named.items()}
    return step, jax.device_get(arrays)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.faults", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("config", help="as for train.py; all other flags are its fields, too")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary folder by default")
    asked, fields = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder {folder} is not empty")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))  # what a run compiled serves the next
        struck, found = survive([asked.config, *fields], folder, asked.kills, asked.seed)
        if found:
            print(f"after {struck} kills: NOT the same: {found}")
            return 1
        count, arrays = len(read(folder / "whole")), len(last_arrays(folder / "whole")[1])
        print(f"after {struck} kills: {count} lines of metrics and {arrays} arrays are the same to the last bit")
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
