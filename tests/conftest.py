"""Tests are stricter than use: implicit promotion raises, and everything runs on eight fake CPU devices.

`make test-gpu` alone asks for another platform, by JAX_PLATFORMS=cuda,cpu.
"""

import contextlib
import gc
import itertools
import os
import pathlib
import platform
import time
from collections.abc import Iterator
from typing import Any

import cheap

# XLA reads these once, when jax is first imported. Tests mostly compile: the cheapest code generation takes two thirds
# off the CPU time of that. The cache serves both workers and the next run; small programs are not worth the writing.
if os.environ.get("JAX_PLATFORMS") != "cuda,cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *cheap.flags()])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # where an operation was written: a twentieth of the time

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same draws on every machine and every run; no deadline, because a first draw may compile.
hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None, max_examples=20)
hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", type=pathlib.Path, help="a file for the table of the fault matrix")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if path := config.getoption("--faults-report"):
        from faults import report

        from benchmarks.report import commit, machine

        told = [one for kind in ("passed", "failed", "error") for one in terminalreporter.stats.get(kind, [])]
        about = {"command": "`make test-faults`", "date": time.strftime("%Y-%m-%d"), "commit": commit()}
        about |= {"machine": machine(), "python": platform.python_version(), "jax": jax.__version__}
        path.write_text(
            report([(t.nodeid, t.outcome, t.duration) for t in told if t.when == "call" or t.failed], about)
        )
        terminalreporter.write_line(f"written: {path}")


MAPPINGS = 30_000  # of memory, half of what Linux allows a process; each compiled program holds some
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forgets compiled programs before they are too many: out of mappings, XLA ends the process with a fault."""
    maps = pathlib.Path("/proc/self/maps")
    if next(_finished) % 8 == 0 and maps.exists():
        with maps.open("rb") as lines:
            if sum(1 for _ in lines) > MAPPINGS:
                jax.clear_caches()
                gc.collect()


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Double precision inside the block: Python floats become float64 and jnp.float64 is honoured."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """Runs the whole test in double precision."""
    with x64():
        yield
