"""Trials of the fault matrix: how they are counted, and what they break."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax import Array

from layers.layer import Layer, LayerConfig, Out, Tokens
from training.digests import META, digest
from training.log import Log, read

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PAGE = 4096
SUMS = "SHA256SUMS"


def trials(fast: int, full: int) -> Callable[[Callable], Callable]:
    """Calls a test with trial = 0, 1, ... full - 1; those from `fast` on by `make test-faults` alone."""
    numbers = [pytest.param(n, marks=() if n < fast else pytest.mark.faults) for n in range(full)]
    return pytest.mark.parametrize("trial", numbers)


PROMISES = {
    1: "while starting, training, saving, evaluating, restoring: every line of metrics and every array is as "
    "undisturbed, to the bit; at most two intervals between checkpoints are trained again",
    2: "SIGTERM, SIGINT, SIGUSR1: the step is saved, the exit code is 128 + signal, the rest is identical",
    3: "again while it saves: the step is whole; a third time: it leaves at once, with what was whole",
    4: "a bit or a page of each file: told by name, passed over, the step before comes back to the bit",
    5: "cut short, missing, without its list, empty, never finished: the same",
    6: "refused in one line; nothing is begun anew, nothing is changed",
    7: "one line; earlier steps stay, and the run goes on where there is room",
    8: "the second is refused, with process and host; a killed one's lock is taken over",
    9: "each field: what would make it another run is refused by name, the rest is recorded",
    10: "eight layouts, one, two and four processes: the same batches, losses within 1e-6",
    11: "not a number, infinite, in values, gradients, a running state: the step changes nothing and is counted",
    12: "slow, empty, not text, cut short, replaced, gone, failing: repaired, or refused in one line",
    13: "all leave within the heartbeat and five seconds; the same command goes on",
    14: "a tracker or a disk for logs that fails: training is unaffected, one warning",
    15: "nothing in it runs, nothing outside is read, one line",
    16: "goes on, with the losses of today",
    17: "by a day, forward or back, at any step: nothing changes",
}


def counted(name: str) -> tuple[int, str] | None:
    """(row, fault) of a test by its node's name, "tests/test_faults.py::test_04_rot[3]"."""
    found = re.search(r"test_faults\w*\.py::test_(\d\d)_(\w+)", name)
    return (int(found[1]), found[2].replace("_", " ")) if found else None


def report(outcomes: list[tuple[str, str, float]], about: dict[str, str]) -> str:
    """Markdown, of (node, outcome, seconds) and of where they were seen."""
    rows: dict[tuple[int, str], list[tuple[str, float]]] = {}
    for name, outcome, seconds in outcomes:
        if row := counted(name):
            rows.setdefault(row, []).append((outcome, seconds))
    total = [one for found in rows.values() for one in found]
    lines = ["# The fault matrix", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Each trial draws its fault by its number. The last column is what had to hold in every one.", ""]
    lines += ["| row | fault | trials | held | did not | seconds | what must hold |", "|---|---|---|---|---|---|---|"]
    for (number, fault), found in [*sorted(rows.items()), ((0, "all"), total)]:
        good, seconds = sum(outcome == "passed" for outcome, _ in found), sum(s for _, s in found)
        start = f"| {number or ''} | {fault} | {len(found):,} | {good:,} | {len(found) - good} | {seconds:,.0f} |"
        lines.append(f"{start} {PROMISES.get(number, '')} |")
    return "\n".join(lines) + "\n"


# Files.


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, draw: np.random.Generator) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
    path.write_bytes(content)


def blank(path: Path, draw: np.random.Generator) -> None:
    """A page of zeros, as a disk that lost one gives back."""
    content = bytearray(path.read_bytes())
    start = int(draw.integers(-(-len(content) // PAGE))) * PAGE
    zeros = bytes(len(content[start : start + PAGE]))
    if content[start : start + PAGE] == zeros:
        return flip(path, draw)
    content[start : start + PAGE] = zeros
    path.write_bytes(content)


def truncate(path: Path, draw: np.random.Generator) -> None:
    os.truncate(path, int(draw.integers(path.stat().st_size)))


def delete(path: Path, draw: np.random.Generator) -> None:
    path.unlink()


def signed_anew(step: Path) -> None:
    """The digests of a checkpoint as they are now: what somebody would write who meant harm."""
    lines = [f"{digest(path)}  {path.relative_to(step)}" for path in files(step) if path.name != SUMS]
    (step / SUMS).write_text("".join(line + "\n" for line in lines))


def made_with(run: Path, config: str) -> None:
    """Has the checkpoints say that they were made with this config."""
    for step in (run / "checkpoints").iterdir():
        record = json.loads((step / META).read_text())
        record["meta"]["config"] = config
        (step / META).write_text(json.dumps(record))
        signed_anew(step)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, dirs_exist_ok=True)
    return to


# Runs.


def whole_and_half(folder: Path) -> Path:
    """With `whole`, a run that nothing disturbed, and `half`, stopped at step 8: checkpoints of 4 and 8."""
    tiny.trained(folder, "whole")
    with on_line(8, lambda: send(signal.SIGTERM)):
        tiny.trained(folder, "half")
    return folder


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read(run) if "kind" not in line}


def bits(groups: dict[str, dict[str, Any]]) -> dict[str, bytes]:
    return {f"{g}/{n}": np.asarray(x).tobytes() for g, named in groups.items() for n, x in named.items()}


# Moments.


@contextlib.contextmanager
def on_line(step: int, do: Callable[[], Any]) -> Iterator[None]:
    """Does something when the line of that step has been written."""
    write = Log.write

    def then(self, at, metrics):
        write(self, at, metrics)
        if at == step and "kind" not in metrics:
            do()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", then)
        yield


def send(kind: signal.Signals) -> None:
    """To this very process."""
    os.kill(os.getpid(), kind)


# Numbers.


@dataclasses.dataclass(frozen=True)
class Fuse(LayerConfig):
    """Passes its input on, but for batches that hold a token: then the output or the gradient is what it should not be.

    kind: "value", "gradient", or "state" (a running sum that the token spoils for what follows). times: by what.
    """

    token: int = 0
    kind: str = "value"
    times: float = float("nan")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "FuseLayer":
        return FuseLayer(self)


class FuseLayer(Layer):
    def __init__(self, config: Fuse):
        self.config = config

    def init_state(self, B: int, T: int) -> tuple[()]:
        return ()

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Any = None) -> Out:
        config, met_BT = self.config, tokens.ids_BT == self.config.token
        spoilt = jnp.where(jnp.any(met_BT), config.times, 1.0).astype(x_BTD.dtype)
        if config.kind == "gradient":
            y_BTD = _steep(x_BTD, spoilt)
        elif config.kind == "state":
            after_BT = jnp.cumsum(jnp.where(met_BT, config.times, 0.0), 1).astype(x_BTD.dtype)
            y_BTD = x_BTD + after_BT[..., None]
        else:
            y_BTD = x_BTD * spoilt
        return Out(y_BTD, state)


@jax.custom_vjp
def _steep(x: Array, times: Array) -> Array:
    return x


_steep.defvjp(lambda x, times: (x, times), lambda times, dy: (dy * times, jnp.zeros_like(times)))
