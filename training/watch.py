"""What a person who runs a run wants to know of its time: a trace of some steps, an end to a step that never ends, and
the share of its time that went into steps that count."""

import dataclasses
import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from training import processes
from training.log import METRICS, read
from training.settings import ConfigError

TIMES = "times.jsonl"
PROFILE = "profile"
STACKS = "hung.txt"
HUNG = 70  # exit status


class Profiler:
    """Traces steps FIRST to LAST of "FIRST:LAST" into RUN/profile: for xprof, and perfetto_trace.json.gz for Perfetto.

    Raises ConfigError for words that are no such steps. What is traced when a run leaves is written, too.
    """

    def __init__(self, run: Path, steps: str | None):
        self.folder, self.first, self.last, self.running = run / PROFILE, 0, 0, False
        if steps is None:
            return
        first, _, last = steps.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"profile is {steps!r}: give the first and the last step to trace, such as 20:22")
        self.first, self.last = int(first), int(last)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()

    def check(self, start: int, steps: int) -> None:
        """Raises ConfigError where steps start + 1 to `steps` are left, and the first to trace is none of them."""
        if self.first and not start < self.first <= steps:
            left = f"steps {start + 1} to {steps} are left" if start < steps else "no step is left"
            raise ConfigError(f"profile is '{self.first}:{self.last}', but {left} of this run: name some of those")

    def before(self, step: int, state: Any) -> None:
        if step == self.first:
            jax.block_until_ready(state)  # what was begun before is not of these steps
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True

    def after(self, step: int, state: Any) -> Path | None:
        """The folder, where this step was the last one."""
        if not self.running or step < self.last:
            return None
        jax.block_until_ready(state)
        self.running = False
        jax.profiler.stop_trace()
        return self.folder


class Watchdog:
    """Ends the process, exit status 70, when no step has ended for so many seconds; 0: never.

    It counts from the first `beat` on, so that compiling may take its time; and it counts its own wakings, so that a
    process that was suspended is not taken for one that hangs. RUN/hung.txt then has the stacks of all threads.
    """

    def __init__(self, run: Path, seconds: float):
        self.run, self.seconds, self.silent, self.step = run, seconds, 0.0, 0
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.over.set()

    def beat(self, step: int) -> None:
        self.silent = 0.0
        if not self.step and self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        self.step = step

    def _watch(self) -> None:
        nap = min(1.0, self.seconds / 4)
        while not self.over.wait(nap):
            self.silent += nap
            if self.silent >= self.seconds:
                self._bite()

    def _bite(self) -> None:
        path = self.run / (STACKS if processes.count() == 1 else f"{processes.index()}-{STACKS}")
        told = f"the stacks of its threads are in {path}"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            told = f"its stacks could not be written ({error})"
        sys.stderr.write(
            f"{processes.name()}error: no step has ended for {self.seconds:g} s since step {self.step}: {told}. "
            "The same command goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(HUNG)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """steps: seconds in steps that count, each once. alive: seconds in which a process trained the run, or tried."""

    steps: float
    alive: float
    starts: int
    cut: int  # processes that came to no end of their own

    def __str__(self) -> str:
        cut = f", {self.cut} cut short" if self.cut else ""
        share = f"{100 * min(1.0, self.steps / self.alive):.0f}%" if self.alive > 0 else "-"  # a clock was set back
        return (
            f"goodput {share}: {_time(self.steps)} of {_time(self.alive)} in steps that count "
            f"({self.starts} start{'s' * (self.starts != 1)}{cut})"
        )


class Times:
    """Writes when processes came and went to RUN/times.jsonl. One that was killed went when it last wrote its log."""

    def __init__(self, run: Path, began: float):
        self.path = run / TIMES
        lines = _lines(self.path)
        if lines and "to" not in lines[-1]:
            log = run / METRICS
            end = max(log.stat().st_mtime if log.exists() else 0.0, lines[-1]["from"])
            self._append({"to": end, "cut": True})
        self._append({"from": began})

    def end(self) -> Goodput:
        self._append({"to": time.time()})
        return goodput(self.path.parent)

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:
            pass  # the log has said that nothing can be written here


def goodput(run: Path) -> Goodput:
    """Of a run's folder: of all processes that trained it."""
    lines = _lines(run / TIMES)
    starts = [line["from"] for line in lines if "from" in line]
    ends = [line["to"] for line in lines if "to" in line]
    alive = sum(end - start for start, end in zip(starts, ends, strict=False))
    steps = sum(line.get("seconds", 0.0) for line in read(run) if "kind" not in line)
    return Goodput(steps, alive, len(starts), sum("cut" in line for line in lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short
    return found


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
