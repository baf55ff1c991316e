"""Our memories, ready to be timed: the test-time engine in its forms, the Titans layer, and a mixture.

Run as `python -m benchmarks.contestants_memories` by benchmarks/memories.py and benchmarks/mixture.py.
"""

import functools
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any
from unittest import mock

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers import test_time
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import Tokens
from layers.mixture import MixtureOfMemories
from layers.ops import fast_weights as fw
from layers.ops.memory_forms import Rule
from layers.ops.test_time import Gate, test_time_memory
from layers.titans import Titans


def engine(mode: str, B: int, T: int, H: int, K: int, C: int, form: str, remat: bool) -> Loaded:
    """A memory of two matrices, x + LN(gelu(x W) W), with momentum and decay: no projections around it."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, H, K)), jnp.float32) for _ in range(3))
    k, q = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (k, q))
    sizes = fw.sizes("mlp", K, K, 4 * K)
    start = {n: jnp.asarray(rng.standard_normal((H, *s)) * s[0] ** -0.5, jnp.float32) for n, s in sizes.items()}
    outer = {"scale": jnp.ones((H, K)), "shift": jnp.zeros((H, K))}
    uniform = lambda low, high: jnp.asarray(rng.uniform(low, high, (B, T, H, 1)), jnp.float32)  # noqa: E731
    gates = {n: Gate(uniform(0, 0.1 / C), jnp.log(uniform(0.98, 1)), jnp.log(uniform(0.5, 0.9))) for n in sizes}
    # A retention that the engine cannot know to be none: weights of each token are formed.
    rule = Rule(fw.network("mlp", 2), fw.l2, (lambda a: a) if form == "materialised" else None, chunk=C)

    def forward(q, k, v, gates, start):
        options: Any = {"implementation": "chunked", "remat": remat, "wanted": False}
        return test_time_memory(rule, q, k, v, gates, (start, None), outer, **options)[0]

    return _compiled(mode, forward, (q, k, v, gates, start))


def layer(mode: str, B: int, T: int, D: int, H: int, C: int, remat: bool) -> Loaded:
    """The Titans layer of width D with its projections and gates, without convolution and output gate.

    Not remat: as no config asks for it; all that the backward pass wants is kept, of a known number of chunks.
    """
    built = Titans(H=H, chunk=C, conv=0, gate=False).build(D, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
    said = Tokens(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)))

    def forward(built: Any, x: Any) -> Any:
        kept = functools.partial(test_time_memory, remat=remat)
        with mock.patch.object(test_time, "test_time_memory", kept):
            return built.learn(x, said.pos_BT, chunks=None if remat else -(-T // C)).y_BTD

    return _compiled(mode, forward, (built, x))


def mixture(mode: str, B: int, T: int, D: int, H: int, M: int) -> Loaded:
    """M memories of Gated DeltaNet, two for a token and a shared one; M 0: the layer itself."""
    base = GatedDeltaNet(H=H)
    built = (MixtureOfMemories(base, M=M, top=2) if M else base).build(D, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
    said = Tokens(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)))
    return _compiled(mode, lambda built, x: built(x, said).y_BTD, (built, x))


def _compiled(mode: str, forward: Callable[..., Any], arguments: tuple[Any, ...]) -> Loaded:
    def loss(arguments: Any) -> Any:
        return jnp.sum(jnp.square(forward(*arguments)))

    start = time.process_time()
    whole = (lambda a: forward(*a)) if mode == "fwd" else jax.grad(loss)
    run = jax.jit(whole).lower(arguments).compile()
    facts = {"compile_s": time.process_time() - start}
    memory: Any = run.memory_analysis()
    facts["temp_mb"] = memory.temp_size_in_bytes / 1e6
    outputs = lambda: {str(i): np.asarray(a) for i, a in enumerate(jax.tree.leaves(run(arguments)))}  # noqa: E731
    return Loaded(lambda: jax.block_until_ready(run(arguments)), outputs, facts)


def load(what: str, **options: Any) -> Loaded:
    makers: dict[str, Callable[..., Loaded]] = {"engine": engine, "layer": layer, "mixture": mixture}
    return makers[what](**options)


if __name__ == "__main__":
    serve(load, lambda: {"jax": version("jax"), "flax": version("flax")})
