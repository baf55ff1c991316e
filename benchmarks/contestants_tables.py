"""A training step of a small model around one table, ready to be timed; the state goes on from step to step, donated.

Run as `python -m benchmarks.contestants_tables` by benchmarks/tables.py.
"""

import time
from importlib.metadata import version
from typing import Any

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.engram import Engram
from layers.mlp import MLP
from models.lm import LM, Stage
from models.parameters import flatten
from training.data import DataConfig
from training.experiment import AdamW, Experiment
from training.optimizer import build_optimizer
from training.step import DeviceBatch, init_state, train_step

W, BATCHES = 257, 8


def load(lazy: bool, rows: int, B: int, T: int, D: int, K: int) -> Loaded:
    """rows: of the table, half for 2-grams and half for 3-grams."""
    engram = Engram(W=W, N=3, H=1, K=K, rows=rows // 2)
    model = LM(W=W, D=D, stages=(Stage((engram, MLP())),))
    experiment = Experiment("A benchmark.", model, DataConfig(T=T, B=B), AdamW(lazy_tables=lazy))
    structure = flatten(jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))))[1]
    optimizer = build_optimizer(experiment.optimizer, 1000, 1.0, structure.specs)
    step = train_step(experiment, structure, optimizer, np.ones(W, np.int32), None)
    state = jax.jit(lambda: init_state(experiment, flatten(model.build(rngs=nnx.Rngs(0)))[0], optimizer))()
    pos = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    drawn = np.random.default_rng(0).integers(0, W, (BATCHES, B, T + 1)).astype(np.int32)
    batches = [DeviceBatch(jnp.asarray(x[:, :-1]), pos, jnp.asarray(x[:, 1:])) for x in drawn]
    start = time.process_time()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
    seconds = time.process_time() - start
    memory: Any = compiled.memory_analysis()
    held, taken = [state], [0]

    def run() -> None:
        state, _ = compiled(held.pop(), batches[taken[0] % BATCHES])
        held.append(jax.block_until_ready(state))
        taken[0] += 1

    return Loaded(run, dict, {"compile_s": seconds, "temp_mb": memory.temp_size_in_bytes / 1e6})


if __name__ == "__main__":
    serve(load, lambda: {"jax": version("jax"), "flax": version("flax")})
