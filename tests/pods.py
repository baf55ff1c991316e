"""Whether a step fits the chips of a pod, estimated from shapes, where compiling it would take many minutes."""

from typing import Any

import jax
from jax.sharding import AbstractMesh

from layers.ops.place import AXES
from models.parameters import Params, Structure
from training.experiment import Experiment
from training.layout import Layout, axis_sizes
from training.optimizer import build_optimizer
from training.step import init_state
from training.summary import held

# Copies of a device's residual stream that a layer's activations and slopes take: of the steps that were compiled
# (results/aot), 20 to 55 for each layer of the block that is recomputed.
STREAMS = 64
# Of a chip's memory, at most: the rest is for layers that hold more than those that were compiled.
ROOM = 2 / 3


def estimate(experiment: Experiment, params: Params, structure: Structure, devices: int) -> int:
    """Bytes of a device: parameters, optimiser, gradients, the residual stream as each block keeps it, a block's
    activations, and the words and their slopes, which lie whole where they are used."""
    model, train = experiment.model, experiment.train
    layout = Layout(abstract(experiment, devices))
    optimizer = build_optimizer(experiment.optimizer, train.steps, train.clip, structure.specs)
    state = jax.eval_shape(lambda params: init_state(experiment, params, optimizer), params)
    found = held(experiment, layout, structure.specs, laid_out(state, layout.like(state, structure.specs)))
    longest = max(len(stage.pattern) for stage in model.stages)
    return found.state + found.gradients + found.kept + STREAMS * longest * found.stream + 2 * 4 * model.W * model.D


def abstract(experiment: Experiment, devices: int) -> AbstractMesh:
    """The mesh of an experiment over devices that are not there. Raises ValueError where sizes do not divide."""
    data, parts = experiment.data, experiment.train.accumulate
    sizes = axis_sizes(experiment.mesh, data.B, data.T, [0] * devices, parts)
    return AbstractMesh(tuple(sizes.values()), AXES)


def laid_out(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
