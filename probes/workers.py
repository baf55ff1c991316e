"""Cells of a study side by side: processes that train one program at a time, each on cores of its own.

Small arms do not fill the cores of a CPU: on two, one cell at a time kept 1.6 of them busy, and took 1.4 times as long
as two at a time. The first process has the folder's lock and writes the ledger. It hands a worker a cell and its arms,
a line of JSON, and hears of steps and of rows by lines of JSON. The state of a program lies where it always does, so
that one that was stopped goes on, by workers or without.
"""

import contextlib
import dataclasses
import io
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from probes.ablation import (
    LEDGER,
    UNFINISHED,
    Bar,
    Program,
    Stopped,
    Work,
    effort,
    keep,
    opened,
    prepare,
    program,
    programs,
    tidy,
)
from probes.studies import Options, changed, find
from probes.study import Numbers
from training.flags import parse
from training.heap import keep_heap
from training.settings import ROOT, ConfigError
from training.stop import Stop

Heard = queue.Queue[tuple["Worker", dict[str, Any]]]


def run(work: Work, only: Sequence[str], workers: int, arguments: Sequence[str]) -> int:
    """Trains what the ledger lacks, as `probes.ablation.run` does, by so many processes.

    arguments: the study's name and flags, from which a worker makes the same study. Raises Stopped after a signal, when
    all that is under way is on the disk; ConfigError for a worker that failed, after the others have saved.
    """
    shares = _shares(workers)
    # The longest first, or the last of them would keep one worker alone busy.
    waiting = sorted(programs(work, only), key=effort, reverse=True)
    if not waiting:
        return 0
    heard: Heard = queue.Queue()
    failure = ""
    (work.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with Stop() as stop, Bar(work, waiting) as bar, contextlib.ExitStack() as stack:
        team = [
            stack.enter_context(Worker(number, shares[number], work, arguments, heard))
            for number in range(min(workers, len(waiting)))
        ]
        leaving = False
        while True:
            if (stop.requested or failure) and not leaving:
                leaving = True
                for worker in team:
                    worker.stop()
            for worker in team:
                if not (worker.one or leaving) and (one := _free(waiting, team)):
                    worker.give(one)
            if not any(worker.one for worker in team):
                break
            try:
                worker, said = heard.get(timeout=0.5)
            except queue.Empty:
                continue
            one = worker.one
            if one is None:
                continue  # it has ended, as it was told to
            if "told" in said:
                bar.told(one, *said["told"])
                continue
            worker.one = None
            if "rows" in said:
                keep(work, one, said["rows"], bar)
            elif "stopped" not in said and not leaving:
                failure = failure or f"{one[0].cell.name}: {said.get('error') or worker.last_words()}"
    tidy(work)
    if failure:
        raise ConfigError(failure)
    if stop.requested:
        raise Stopped(stop.requested)
    return bar.count


def _free(waiting: list[Program], team: Sequence["Worker"]) -> Program | None:
    """The next program of a cell that no worker is at: programs of one cell have one place for their state."""
    at = {worker.one[0].digest for worker in team if worker.one}
    for number, (resolved, _) in enumerate(waiting):
        if resolved.digest not in at:
            return waiting.pop(number)
    return None


class Worker:
    """A process that trains what it is given. one: the program that it is at."""

    def __init__(self, number: int, cores: Sequence[int], work: Work, arguments: Sequence[str], heard: Heard):
        self.one: Program | None = None
        self._log = work.folder / UNFINISHED / f"worker-{number}.txt"
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "probes.workers", ",".join(map(str, cores)), str(work.folder), *arguments]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for the first process, which passes it on
            )
        self._listener = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._listener.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its input is its end: at once if it has nothing to do, else when it has saved."""
        with contextlib.suppress(OSError):
            self._write("")
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.unlink(missing_ok=True)

    def give(self, one: Program) -> None:
        self.one = one
        resolved, arms = one
        with contextlib.suppress(OSError):  # it is gone, which the listener says
            self._write(json.dumps({"cell": resolved.cell.name, "arms": [*map(dataclasses.asdict, arms)]}) + "\n")

    def stop(self) -> None:
        self._process.terminate()

    def last_words(self) -> str:
        """Of one that ended by itself."""
        status = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        ended = f"signal {-status}, as when memory runs out" if status == -signal.SIGKILL else f"status {status}"
        said = f" ({lines[-1]})" if lines else ""
        return f"its worker ended with {ended}{said}; what was done is kept: fewer workers take less memory"

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _listen(self, heard: Heard) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard.put((self, json.loads(line)))
        heard.put((self, {"gone": True}))


def _shares(workers: int) -> list[list[int]]:
    """The cores of each worker; none where the system cannot say or give them."""
    if jax.default_backend() != "cpu":
        raise ConfigError(f"workers is {workers}: they are for CPUs; on other devices the arms of a cell share them")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = len(cores) or os.cpu_count() or 1
    if not 1 <= workers <= count:
        raise ConfigError(f"workers is {workers}: give 1 to {count}, the cores of this machine")
    return [cores[k * count // workers : (k + 1) * count // workers] for k in range(workers)]


def main(arguments: list[str]) -> int:
    """A worker: what to train comes by standard input, and what is said goes to standard output."""
    cores, folder, name, *flags = arguments
    keep_heap()  # before XLA has threads: each would come with an arena of its own, of which nothing is kept
    if cores:
        os.sched_setaffinity(0, set(map(int, cores.split(","))))
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no line of JSON

    def say(**said: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the end of the input says so, too
            lines.write(json.dumps(said) + "\n")
            lines.flush()

    study, title = find(name)
    study = changed(study, parse(Options(), flags, program=f"python ablate.py {name}"))
    cells = prepare(study)
    command = "python ablate.py " + shlex.join(arguments[2:])
    ledger = opened(Path(folder) / LEDGER, writable=False)
    work = Work(study, title, cells, ledger, Path(folder), command, Console(file=io.StringIO()))
    by_name = {resolved.cell.name: resolved for resolved in cells}
    orders: queue.Queue[str] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            busy.set()
            orders.put(line)
        orders.put("")
        if busy.is_set():  # whoever gave it is gone
            os.kill(os.getpid(), signal.SIGTERM)

    with Stop() as stop:
        threading.Thread(target=listen, daemon=True).start()
        while line := orders.get():
            order = json.loads(line)
            one = by_name[order["cell"]], [Numbers(**arm) for arm in order["arms"]]
            try:
                rows = program(work, one, stop, lambda *told: say(told=told))
            except Stopped:
                say(stopped=True)
                break
            except (ConfigError, ValueError, OSError) as error:
                say(error=str(error).splitlines()[0])
                break
            busy.clear()
            say(rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
