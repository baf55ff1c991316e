"""Memory that is kept: a step on a CPU takes its temporaries from what the last one freed."""

import subprocess
import sys

import pytest

from training.heap import cpu_alone

MAIN = """
import resource
from training.door import enter

def main(arguments):
    import jax
    import jax.numpy as jnp
    step = jax.jit(lambda x: jax.lax.optimization_barrier(jnp.flip(jnp.sin(x), 0) * 2).sum())
    x = jnp.ones((64, 2**19))  # 128 MiB, so 32,768 pages
    for _ in range(20):  # until the heap has found its size
        step(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step(x).block_until_ready()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
    return 0

enter(main, "")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told")
def test_a_command_keeps_its_memory():
    """Of 32,768 pages a step, next to none is asked of the system anew."""
    done = subprocess.run([sys.executable, "-c", MAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 800


@pytest.mark.parametrize(
    "said, plugin, want", [("cpu", True, True), ("cuda,cpu", False, False), (None, False, True), (None, True, False)]
)
def test_an_accelerator_is_known_without_asking_for_it(monkeypatch, said: str | None, plugin: bool, want: bool):
    monkeypatch.delenv("JAX_PLATFORMS")
    if said:
        monkeypatch.setenv("JAX_PLATFORMS", said)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if plugin and name == "jax_plugins" else None)
    assert cpu_alone() is want
