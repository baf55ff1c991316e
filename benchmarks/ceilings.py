"""What XLA can do at best on one core of this machine: python -m benchmarks.ceilings (ten seconds).

Products and exponentials are what attention and chunked recurrences are made of; results/bench_cpu_misses.md reads its
goals against these.
"""

import os

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {0})  # before jax counts the cores
os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pair import timed


def best(function: Callable[..., Any], *arguments: Any) -> float:
    """CPU seconds of a call, the best of ten rounds."""
    run = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(run(*arguments))
    return min(timed(lambda: jax.block_until_ready(run(*arguments)), 0.1) for _ in range(10)) / 1e3


def main() -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    n = 2048
    print(f"product of {n} cubed: {2 * n**3 / best(jnp.matmul, normal(n, n), normal(n, n)) / 1e9:.0f} GFLOP/s")
    a, b = normal(8, 64, 64), normal(8, 64, 64)
    for equation in ("bij,bjk->bik", "bij,bkj->bik", "bji,bjk->bik"):
        rate = 2 * 8 * 64**3 / best(lambda a, b, e=equation: jnp.einsum(e, a, b), a, b) / 1e9
        print(f"8 products of 64 cubed, {equation}: {rate:.0f} GFLOP/s")
    x = normal(512, 512)
    print(f"exponential: {best(jnp.exp, x) / x.size * 1e9:.2f} ns")


if __name__ == "__main__":
    main()
