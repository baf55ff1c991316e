"""Ways of attention within documents on a GPU: milliseconds forward, and forward and backward.

    python -m benchmarks.attention_documents

Rows of documents of random lengths, bfloat16. Blocks, cuDNN's kernel with a mask of the documents, and cuDNN's without
documents, which is another sum and what the mask costs. The least of six bursts of five calls; the wall's clock.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.pair import timed
from layers.attention import number
from layers.ops.attention import attention


def documents(B: int, T: int, rng: np.random.Generator) -> np.ndarray:
    """Positions [B, T] of tokens in documents of 64 to 2,000 tokens."""
    rows = []
    for _ in range(B):
        lengths: list[int] = []
        while sum(lengths) < T:
            lengths.append(int(rng.integers(64, 2000)))
        rows.append(np.concatenate([np.arange(n) for n in lengths])[:T])
    return np.stack(rows).astype(np.int32)


def least(function: Callable[..., object], *arguments: Array) -> float:
    """Milliseconds of a call, of the best burst; the first call compiles."""

    def burst() -> None:
        jax.block_until_ready([function(*arguments) for _ in range(5)])

    jax.block_until_ready(function(*arguments))
    return min(timed(burst, 0, time.perf_counter) for _ in range(6)) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size, what in (("B", 4, "rows"), ("T", 4096, "tokens"), ("H", 16, "heads"), ("K", 64, "channels")):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{what} (default {size:,})")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (options.B, options.T, options.H, options.K)
    q, k, v, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(4))
    time_BT, since_BT = number(jnp.asarray(documents(options.B, options.T, rng)), 0, 0)
    within = partial(attention, query_time=time_BT, key_time=time_BT, since=since_BT, ordered=True)
    ways: dict[str, Callable[..., Array]] = {
        "blocks": partial(within, implementation="blocks"),
        "cuDNN, a mask": partial(within, implementation="cudnn"),
        "cuDNN, no documents": partial(attention, implementation="cudnn"),
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, B T H K {shape}")
    for name, way in ways.items():

        def both(q: Array, k: Array, v: Array, dy: Array, way: Callable[..., Array] = way) -> tuple[Array, ...]:
            y, back = jax.vjp(way, q, k, v)
            return y, *back(dy)

        try:
            times = least(jax.jit(way), q, k, v), least(jax.jit(both), q, k, v, dy)
        except Exception as error:  # cuDNN asks for a GPU
            print(f"{name:22} {str(error).splitlines()[0]}")
            continue
        print(f"{name:22} fwd {times[0]:8.3f} ms   fwd+bwd {times[1]:8.3f} ms", flush=True)


if __name__ == "__main__":
    main()
