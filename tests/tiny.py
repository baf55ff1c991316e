"""The smallest experiment that trains, and train.py in processes of its own."""

import dataclasses
import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from layers.linear import LinearAttention
from layers.mlp import MLP
from models.lm import LM, Stage
from training import settings
from training.data import Text
from training.experiment import AdamW, Experiment, Mesh, Schedule, Train
from training.log import read
from training.run import Outcome, train

ROOT = Path(__file__).parents[1]


def corpus(folder: Path) -> None:
    """Twenty small texts in folder/text."""
    draw = random.Random(0)
    text = folder / "text"
    text.mkdir(parents=True)
    for index in range(20):
        (text / f"{index}.txt").write_text("".join(draw.choice("abcdef \n") for _ in range(400)))


def experiment(folder: Path, **changes: Any) -> Experiment:
    """Four evaluations and five checkpoints in 20 steps. `changes` are to fields: train__steps=5."""
    text = folder / "text"
    if not text.exists():
        corpus(folder)
    made = Experiment(
        description="Tiny.",
        model=LM(W=257, D=16, stages=(Stage((LinearAttention(H=2, K=4, V=8), MLP())),)),
        data=Text(T=16, B=2, source=str(text), store=str(folder / "store"), held_out=0.3),
        optimizer=AdamW(lr=1e-2, schedule=Schedule(warmup=5, shape="constant")),  # of any length, one program
        train=Train(steps=20, log_every=1, eval_every=5, checkpoint_every=4, eval_batches=3, tensorboard=False),
        mesh=Mesh(data=1),  # of how many devices there are, the same everywhere
    )
    return changed(made, **changes)


def changed(made: Experiment, **changes: Any) -> Experiment:
    for path, value in changes.items():
        room, _, field = path.rpartition("__")
        part = dataclasses.replace(getattr(made, room), **{field: value}) if room else value
        made = dataclasses.replace(made, **{room or field: part})
    return made


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.py"
    path.write_text(settings.render(experiment(folder, **changes)))
    return path


def quiet() -> Console:
    """A console to be read: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)


def trained(
    folder: Path,
    run: str,
    *,
    resume: str = "auto",
    profile: str | None = None,
    console: Console | None = None,
    **changes: Any,
) -> Outcome:
    """Trains in this process, in folder/run."""
    made, console = experiment(folder, **changes), console or quiet()
    return train(made, folder / run, resume=resume, profile=profile, console=console)


LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"""


def command(*arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]


def run(*arguments: Any, largest_file: int | None = None) -> subprocess.CompletedProcess:
    """train.py from the root, as a user would; where no file may grow beyond a size, as on a disk that is full."""
    words = command(*arguments)
    if largest_file is not None:
        words = [sys.executable, "-c", LIMITED, str(largest_file), *words[1:]]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=250)


def start(*arguments: Any) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read(folder) if "kind" not in line]


def arrays(outcome: Outcome) -> dict[str, bytes]:
    """The bits of a trained model's parameters."""
    from models.parameters import flatten

    return {name: np.asarray(x).tobytes() for name, x in flatten(outcome["model"])[0].items()}
