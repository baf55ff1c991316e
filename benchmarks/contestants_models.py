"""Whole models of ours, ready to be timed: a training step, decoding, and the matrix product they are measured against.

Run as `python -m benchmarks.contestants_models` by benchmarks/models.py.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from benchmarks.pair import Loaded, pin, serve

if __name__ == "__main__":
    pin()

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.layer import LayerConfig
from layers.mlp import MLP
from models.decode import Decoder, Sampling
from models.lm import LM, Stage
from training.data import Batch, DataConfig, Dataset
from training.experiment import AdamW, Experiment
from training.run import prepare
from training.summary import bytes_of, flops_per_token

WORDS = 256


def mixer(name: str, H: int, K: int) -> LayerConfig:
    if name == "attention":
        from layers.attention import Attention

        return Attention(H=H, K=K)
    if name == "linear":
        from layers.linear import LinearAttention

        return LinearAttention(H=H, K=K, V=K)
    if name == "gdn":
        from layers.gated_deltanet import GatedDeltaNet

        return GatedDeltaNet(H=H, K=K, V=K)
    raise ValueError(f"no model named {name}")


def language_model(name: str, depth: int, D: int, H: int = 4, words: int = WORDS, scan: Any = "never", **fields) -> LM:
    """`depth` blocks of a mixer and an MLP of hidden width 4 D; unrolled, as is faster on the CPU."""
    pattern = (mixer(name, H, D // H), MLP(F=4 * D))
    return LM(W=words, D=D, stages=(Stage(pattern, depth),), scan_layers=scan, **fields)


@dataclasses.dataclass(frozen=True)
class Noise(DataConfig):
    """Random words."""

    words: int = WORDS

    def build(self) -> Dataset:
        return NoiseDataset(self)


class NoiseDataset(Dataset):
    def __init__(self, config: Noise):
        self.config, self.words, self.digest = config, config.words, ""
        self.token_bytes = np.ones(config.words, np.int32)

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        shape = (self.config.B, self.config.T)
        ids = np.random.default_rng((seed, step)).integers(0, self.words, shape).astype(np.int32)
        pos = np.broadcast_to(np.arange(self.config.T, dtype=np.int32), shape)
        return Batch(ids, pos, np.roll(ids, -1, 1))

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        yield self.batch(1, 0, rows)


def train(model: str, depth: int, D: int, B: int, T: int, H: int = 4, words: int = WORDS, **fields: Any) -> Loaded:
    """The step that `train.py` runs, AdamW included, parameters split once and donated. fields: of `language_model`."""
    lm = language_model(model, depth, D, H, words, **fields)
    experiment = Experiment("benchmark", lm, Noise(T=T, B=B, words=words), AdamW())
    start = time.process_time()
    job = prepare(experiment)
    batch = job.dataset.batch(0, 0)
    traced = job.step.trace(job.state, batch)
    trace_s = time.process_time() - start
    start = time.process_time()
    traced.lower().compile()
    compile_s = time.process_time() - start
    state, metrics = job.step(job.init(), batch)
    assert np.isfinite(float(metrics["loss"]))
    box = [state]

    def run() -> Any:
        box[0], metrics = job.step(box[0], batch)
        return jax.block_until_ready((box[0], metrics))

    weights = sum(int(np.prod(s.shape)) for n, s in job.structure.specs.items() if n != "embed" and s.fan_in)
    facts = {
        "trace_s": trace_s,
        "compile_s": compile_s,
        "parameters": sum(int(np.prod(s.shape)) for s in job.structure.specs.values()),
        "leaves": len(job.structure.specs),
        "state_leaves": len(jax.tree.leaves(state)),
        "flops": 6.0 * weights * B * T,  # of products with weights, forward and backward
        "all_flops": flops_per_token(experiment, job.structure, None) * B * T,
    }
    return Loaded(run, dict, facts)


def matmul(n: int) -> Loaded:
    """A float32 product of squares: the peak that utilisation is a part of."""
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    return Loaded(lambda: product(a, a).block_until_ready(), dict, {"flops": 2.0 * n**3})


@functools.cache
def _decoder(model: str, depth: int, D: int, burst: int) -> tuple[Any, Decoder]:
    config = language_model(model, depth, D)
    built = jax.jit(lambda key: config.build(rngs=nnx.Rngs(params=key)))(jax.random.key(0))
    return built, Decoder(built, piece=8, burst=burst)


def decode(model: str, depth: int, D: int, capacity: int, burst: int) -> Loaded:
    """One burst of words after a prompt, by the public generator, at batch 1; memories that hold `capacity` tokens."""
    built, decoder = _decoder(model, depth, D, burst)
    prompt = list(range(decoder.piece))
    steps = (capacity - len(prompt)) // burst * burst

    def words() -> Iterator[np.ndarray]:
        while True:
            yield from decoder.generate([prompt], steps, Sampling(temperature=0), capacity=capacity)

    stream = words()
    start = time.process_time()
    next(stream)
    facts = {
        "compile_s": time.process_time() - start,
        "state_bytes": bytes_of(jax.eval_shape(lambda: built.init_state(1, capacity))),
        "bursts": steps // burst - 1,  # until the memory is full and the stream starts anew
    }
    return Loaded(lambda: next(stream), dict, facts)


def load(op: str, **options: Any) -> Loaded:
    makers: dict[str, Callable[..., Loaded]] = {"train": train, "matmul": matmul, "decode": decode}
    return makers[op](**options)


if __name__ == "__main__":
    serve(load, lambda: {"jax": version("jax"), "flax": version("flax")})
