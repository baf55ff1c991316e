"""Many small runs as one program: those that differ in numbers alone (seed, learning rate, weight decay, init).

A step of all of them is one call. Arms lie along a leading axis of parameters, optimiser state and numbers; arms of the
same seed read the same rows, which are made once. Over several devices the arms are spread.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.lm import LM
from models.parameters import Params, Structure, flatten
from probes.small_runs import answerer
from training.data import Batch, Dataset
from training.experiment import AdamW, Experiment, Muon, Train
from training.optimizer import build_optimizer
from training.step import init_state, train_step


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one run of a grid has for itself.

    seed: of parameters and rows. rate: a factor of the optimiser's learning rates. weight_decay: None for the
    optimiser's. init: a factor of the matrices that a model begins with.
    """

    seed: int = 0
    rate: float = 1.0
    weight_decay: float | None = None
    init: float = 1.0


class Numbers(NamedTuple):
    """Of each arm, float32 [A]."""

    rate: Any
    weight_decay: Any


class Grid:
    """A model over a dataset, in as many arms as wanted."""

    def __init__(self, model: LM, data: Dataset, optimizer: AdamW | Muon, train: Train, arms: Sequence[Arm]):
        if not arms:
            raise ValueError("Grid.arms is empty: give it at least one Arm")
        self.data, self.model, self.arms = data, model, tuple(arms)
        self.experiment = Experiment("study", model, data.config, optimizer, train)
        shapes = jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0)))
        self.structure: Structure = flatten(shapes)[1]
        self.seeds = sorted({arm.seed for arm in arms})
        self._rows = np.array([self.seeds.index(arm.seed) for arm in arms])
        decays = [optimizer.weight_decay if arm.weight_decay is None else arm.weight_decay for arm in arms]
        numbers = Numbers(*(jnp.array(x, jnp.float32) for x in ([arm.rate for arm in arms], decays)))
        self._numbers = jax.device_put(numbers, self._home)
        self.answers = answerer(self.structure)
        # Places that are the same for every arm stay so for XLA: a condition on them must not become a choice.
        self._step = self._of_all(Batch(0, 0, 0, 0))  # type: ignore[arg-type]
        self._in_step = self._of_all(Batch(0, None, 0, 0))  # type: ignore[arg-type]

    def _of_all(self, axes: Batch) -> Any:
        """A step of all arms. axes: of the batch, None for what all have in common."""
        if len(self.arms) > 1:
            return jax.jit(jax.vmap(self._one, in_axes=(0, axes, 0)), donate_argnums=0)  # type: ignore[arg-type]

        def alone(state: Any, batch: Batch, numbers: Numbers) -> Any:
            """Without vmap: XLA on CPU (jax 0.10.2) ends the process in products of GLA with an axis of one arm."""
            parts: Any = (x if x is None or axis is None else x[0] for x, axis in zip(batch, axes, strict=True))
            state, numbers = jax.tree.map(lambda x: x[0], (state, numbers))
            return jax.tree.map(lambda x: x[None], self._one(state, Batch(*parts), numbers))

        return jax.jit(alone, donate_argnums=0)

    def _optimizer(self, numbers: Numbers | None = None) -> Any:
        e, specs = self.experiment, self.structure.specs
        given = {} if numbers is None else numbers._asdict()
        return build_optimizer(e.optimizer, e.train.steps, e.train.clip, specs, **given)

    def _one(self, state: Any, batch: Batch, numbers: Numbers) -> tuple[Any, Any]:
        optimizer = self._optimizer(numbers)
        step = train_step(self.experiment, self.structure, optimizer, self.data.token_bytes, self.data.labelled)
        state, metrics = step(state, batch)  # type: ignore[arg-type]
        return state, metrics["loss"]

    def start(self) -> Any:
        """The state of all arms before the first step."""
        states = []
        for arm in self.arms:
            params, _ = flatten(self.model.build(rngs=nnx.Rngs(arm.seed)))
            specs = self.structure.specs
            params = {name: p * arm.init if specs[name].fan_in else p for name, p in params.items()}
            states.append(init_state(self.experiment, params, self._optimizer()))
        return jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), self._home)

    @functools.cached_property
    def _home(self) -> Any:
        """Where arms lie: spread over the devices if these divide them, else on one."""
        devices = jax.devices()
        if len(devices) == 1 or len(self.arms) % len(devices):
            return devices[0]
        return NamedSharding(Mesh(np.array(devices), ("arms",)), PartitionSpec("arms"))

    def batch(self, step: int) -> Batch:
        """Of all arms, [A, B, T]."""
        each = [self.data.batch(seed, step) for seed in self.seeds]
        stacked: Any = (None if part[0] is None else np.stack(part)[self._rows] for part in zip(*each, strict=True))
        return Batch(*stacked)

    def train(self, begin: tuple[int, Any] | None = None) -> Iterator[tuple[int, Any, Array]]:
        """(steps done, state of all arms, losses [A]) after every step; nothing waits for the devices.

        The state's "params" are what `of` takes. It is donated to the next step: what is to be kept of it must be
        copied before the iteration goes on. begin: the steps done and the state to go on from.
        """
        first, state = begin or (0, self.start())
        for done in range(first + 1, self.experiment.train.steps + 1):
            batch, step = self.batch(done - 1), self._step
            if (batch.pos_BT == batch.pos_BT[:1]).all():
                batch, step = batch._replace(pos_BT=batch.pos_BT[0]), self._in_step
            state, loss_A = step(state, batch, self._numbers)
            yield done, state, loss_A

    def of(self, params: Params, arm: int) -> Params:
        """The parameters of one arm."""
        return {name: value[arm] for name, value in params.items()}
