"""An experiment's program: its pure steps, jitted for a layout, and the shapes of all that they take.

Nothing here holds a number of the model or reads a byte of data. So the same program can be run (training/run.py), or
compiled for devices that are not there (tpu/compile.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.ops.place import on
from models.lm import LanguageModel
from models.parameters import Structure, flatten
from training.data import Batch, Dataset
from training.experiment import Experiment
from training.layout import Layout
from training.optimizer import build_optimizer
from training.step import eval_step, init_state, train_step


@dataclasses.dataclass
class Program:
    """What a run calls, and its arguments as ShapeDtypeStructs.

    model: abstract. state, batch: of the whole mesh, with shardings. init: makes the first state. step: takes the state
    (donated) and a batch. evaluate: takes parameters and a batch.
    """

    model: LanguageModel
    structure: Structure
    state: Any
    batch: Batch
    init: Any
    step: Any
    evaluate: Any


def build_model(experiment: Experiment, key: jax.Array) -> LanguageModel:
    return experiment.model.build(rngs=nnx.Rngs(params=key))


def build_program(experiment: Experiment, data: Dataset, layout: Layout) -> Program:
    """data: a dataset, or its outline (`DataConfig.outline`). Raises ValueError, in a line, for what cannot be."""
    # The key is made of threefry whatever the backend, and partitionable: one initialisation on every mesh.
    key = jax.random.key(experiment.train.seed, impl="threefry2x32")
    build = functools.partial(build_model, experiment)
    model = jax.eval_shape(build, key)
    _, structure = flatten(model)
    train = experiment.train
    optimizer = build_optimizer(experiment.optimizer, train.steps, train.clip, structure.specs)

    def init(key: jax.Array) -> Any:
        return init_state(experiment, flatten(build(key))[0], optimizer)

    abstract = jax.eval_shape(init, key)
    shardings = layout.like(abstract, structure.specs)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    batch = _batch(experiment, data, layout)
    laid_out = structure._replace(spread=layout.spread(structure.specs))
    step = _on(layout, train_step(experiment, laid_out, optimizer, data.token_bytes, data.labelled))
    evaluate = _on(layout, eval_step(laid_out, data.token_bytes, data.labelled))
    if optimizer.lazy is not None:  # only a step knows whether the layers say which rows they read
        jax.eval_shape(step, state, batch)
    return Program(
        model,
        structure,
        state,
        batch,
        init=functools.partial(jax.jit(init, out_shardings=shardings), key),
        step=jax.jit(step, donate_argnums=0, in_shardings=(shardings, layout.batch), out_shardings=(shardings, None)),
        evaluate=jax.jit(evaluate, out_shardings=layout.replicated),
    )


def _on(layout: Layout, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def told(*args: Any) -> Any:
        with on(layout.mesh):
            return function(*args)

    return told


def _batch(experiment: Experiment, data: Dataset, layout: Layout) -> Any:
    def of(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((experiment.data.B, experiment.data.T), dtype, sharding=layout.batch)

    ids, pos, labels = (of(jnp.int32) for _ in range(3))
    return Batch(ids, pos, labels, of(jnp.bool_) if data.prefix else None)  # type: ignore[arg-type]
