"""How contestants are compared.

Each contestant is a process of its own, pinned to one core, with one thread. Rounds are interleaved: in every round
each contestant runs once, in turn, and the ratio of two contestants is the median of the ratios within a round, so that
load on the machine touches both sides alike. The clock is the CPU time of the process. Before anything is timed,
outputs and gradients are compared (`gate`): whoever fails gets no number.

XLA and PyTorch on the CPU take large temporaries from malloc anew at every call; without huge pages the page faults
cost more than the arithmetic. GLIBC_TUNABLES asks for them, and that freed memory is kept, as a training run of ours
keeps it (training/heap.py): for every contestant alike.

A contestant is a module that calls `serve(load)`; it needs numpy and nothing else of this package. It may so live in
an environment of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"
    ":glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1"
)
TOLERANCE = 1e-5  # relative norm of the difference, float32
ROOT = Path(__file__).resolve().parent.parent


class Failed(Exception):
    """A contestant could not do what was asked; the message says why."""


class Loaded(NamedTuple):
    """An operation, ready to be timed, in the process of a contestant."""

    run: Callable[[], Any]  # one call, complete when it returns
    outputs: Callable[[], dict[str, np.ndarray]]  # y and gradients, B T H .
    facts: dict[str, float]  # compile_s, temp_mb, io_mb where known


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|; infinite where anything is not finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
    return difference if np.isfinite(difference) else float("inf")


def gate(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> float:
    """The largest relative difference over outputs and gradients. Raises Failed where it exceeds the tolerance."""
    if ours.keys() != theirs.keys():
        raise Failed(f"accuracy gate: {sorted(ours)} against {sorted(theirs)}")
    for name in ours:
        if ours[name].shape != theirs[name].shape:
            raise Failed(f"accuracy gate: {name} is {ours[name].shape} against {theirs[name].shape}")
    differences = {name: relative(ours[name], theirs[name]) for name in ours}
    worst = max(differences, key=differences.__getitem__)
    if differences[worst] > tolerance:
        raise Failed(f"accuracy gate: {worst} differs by {differences[worst]:.1e}")
    return differences[worst]


class Contestant:
    """A process that runs operations; see `serve` for the other end."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        python: str = sys.executable,
        core: int | None = None,
        accelerator: dict[str, str] | None = None,
    ):
        """accelerator: for work off the CPU, the variables to add to the environment as it is."""
        environment = dict(os.environ, PYTHONWARNINGS="ignore")
        if accelerator is None:
            environment |= {"GLIBC_TUNABLES": TUNABLES, "JAX_PLATFORMS": "cpu"}
            environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
            for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):  # compile times are those of a cold cache
                environment.pop(name, None)
        else:
            environment |= accelerator
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        environment["BENCH_CORE"] = "" if core is None else str(core)
        self.name = " ".join((module, *arguments))
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.versions: dict[str, str] = self._answer()

    def ask(self, command: str, **arguments: Any) -> Any:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says what happened
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise Failed(f"{self.name} ended with {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def load(self, name: str, **options: Any) -> dict[str, float]:
        """Prepares an operation under a name and returns what is known about it."""
        return self.ask("load", name=name, **options)

    def outputs(self, name: str, folder: Path) -> dict[str, np.ndarray]:
        path = folder / f"outputs-{self.process.pid}.npz"
        self.ask("outputs", name=name, path=str(path))
        with np.load(path) as arrays:
            result = dict(arrays)
        path.unlink()
        return result

    def milliseconds(self, name: str, seconds: float) -> float:
        """CPU milliseconds per call, over as many calls as fit in `seconds`."""
        return self.ask("time", name=name, seconds=seconds)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(
    load: Callable[..., Loaded],
    versions: Callable[[], dict[str, str]],
    clock: Callable[[], float] = time.process_time,
) -> None:
    """The contestant's end: answers commands, one JSON object a line, until its input closes.

    `load(**options)` gets what the parent gave to Contestant.load; `inputs`, a path, is read into arrays.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    loaded: dict[str, Loaded] = {}

    def answer(result: Any) -> None:
        answers.write(json.dumps(result) + "\n")
        answers.flush()

    answer({"result": versions()})
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        try:
            name = request.pop("name")
            result: Any = None
            if command == "load":
                if "inputs" in request:
                    with np.load(request["inputs"]) as file:
                        request["inputs"] = dict(file)
                loaded[name] = load(**request)
                result = loaded[name].facts
            elif command == "outputs":
                arrays: dict[str, Any] = loaded[name].outputs()
                np.savez(request["path"], **arrays)
            elif command == "time":
                result = timed(loaded[name].run, request["seconds"], clock)
            else:
                raise ValueError(f"unknown command {command}")
            answer({"result": result})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def pin() -> None:
    """Called by a contestant before it imports its libraries, which count the cores when they start."""
    core = os.environ.get("BENCH_CORE", "")
    if core and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core)})


def timed(run: Callable[[], Any], seconds: float, clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    run()
    first = clock() - start
    calls = min(int(seconds / max(first, 1e-6)), 1000)
    if calls <= 1:
        return first * 1e3
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls * 1e3


class Times(NamedTuple):
    """CPU milliseconds, [round][contestant]."""

    rounds: list[list[float]]

    def median(self, contestant: int) -> float:
        return statistics.median(r[contestant] for r in self.rounds)

    def best(self, contestant: int) -> float:
        return min(r[contestant] for r in self.rounds)

    def ratio(self, contestant: int, to: int = 0) -> float:
        """How many times longer `contestant` takes than `to`: the median over rounds of the ratio within a round."""
        return statistics.median(r[contestant] / r[to] for r in self.rounds)


def interleave(
    entrants: Sequence[tuple[Contestant, str]], rounds: int, seconds: float = 0.15, warm: bool = True
) -> Times:
    """Times (contestant, operation) in turn, `rounds` times, each second round in the opposite order.

    warm: one call each before the first round; the accuracy gate was one already for operations that take seconds.
    """
    if warm:
        for contestant, name in entrants:
            contestant.milliseconds(name, 0.0)
    result = []
    for r in range(rounds):
        order = range(len(entrants)) if r % 2 == 0 else reversed(range(len(entrants)))
        times = {i: entrants[i][0].milliseconds(entrants[i][1], seconds) for i in order}
        result.append([times[i] for i in range(len(entrants))])
    return Times(result)
