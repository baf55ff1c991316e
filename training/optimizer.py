"""An optimiser from its config, over parameters by name."""

from typing import Any, NamedTuple

import jax
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from models.parameters import Spec
from training.experiment import AdamW, Muon, Schedule
from training.lazy import LazyAdam
from training.sinkhorn import sinkhorn_momentum


class Optimizer(NamedTuple):
    """As optax has it, over parameters by name. lazy: what trains the tables, which are then none of its business."""

    init: Any
    update: Any
    lazy: LazyAdam | None = None


def learning_rate(peak: float | Array, schedule: Schedule, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate. The first step already moves: warm-up counts from 1."""
    warmup = min(schedule.warmup, steps)
    rest = max(steps - warmup, 1)
    if schedule.shape == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=schedule.final)
    elif schedule.shape == "wsd":
        down = min(max(round(schedule.decay * steps), 1), rest)
        after = optax.linear_schedule(peak, schedule.final * peak, down, transition_begin=rest - down)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def build_optimizer(
    config: AdamW | Muon,
    steps: int,
    clip: float | None,
    specs: dict[str, Spec],
    *,
    rate: float | Array = 1.0,
    weight_decay: float | Array | None = None,
) -> Optimizer:
    """Clipping by the global norm, then the optimiser. Weight decay spares what asks for it (`decay=False`).

    rate: a factor of every learning rate. weight_decay: instead of the config's. Both may be traced, so that runs which
    differ in them alone are one program (probes/grid.py); the state to begin with does not depend on them.

    Tables that are looked up have a norm of their own, so that few rows with large gradients do not rescale the rest,
    and Adam, or what `config.tables` says, at `table_lr` times the rate (Engram, arXiv 2601.07372).
    """
    tables = {name for name, spec in specs.items() if spec.table}
    eps = config.eps if isinstance(config, AdamW) else 1e-8
    adam_lr = config.lr if isinstance(config, AdamW) else config.adam_lr or config.lr
    decay = config.weight_decay if weight_decay is None else weight_decay
    lazy, table_rate = None, learning_rate(rate * adam_lr * config.table_lr, config.schedule, steps)
    if tables and config.lazy_tables:
        looked_up, specs = ({n: spec for n, spec in specs.items() if spec.table == kind} for kind in (True, False))
        lazy = LazyAdam(looked_up, table_rate, config.b1, config.b2, eps, decay, clip)
        tables = set()

    def decayed(params: Any) -> Any:  # of the parameters that a part of the optimiser is given
        return {name: specs[name].decay for name in params}

    def adam(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(rate, config.b1, config.b2, eps, weight_decay=decay, mask=decayed)

    parts = {"adam": adam(learning_rate(rate * adam_lr, config.schedule, steps))}
    kinds = dict.fromkeys(specs, "adam") | dict.fromkeys(tables, "table")
    if tables:
        parts["table"] = sinkhorn_momentum(table_rate) if config.tables == "sinkhorn" else adam(table_rate)
    if isinstance(config, Muon):
        # optax's muon would train the rest too, but decay all of it: it is given the matrices alone.
        matrices = {name: numbers for name, spec in specs.items() if (numbers := _dimensions(spec)) is not None}

        def dimensions(params: Any) -> Any:
            return {name: matrices.get(name) for name in params}

        parts["muon"] = muon(
            learning_rate(rate * config.lr, config.schedule, steps),
            beta=config.momentum,
            weight_decay=decay,
            weight_decay_mask=decayed,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,
        )
        kinds |= dict.fromkeys(matrices, "muon")
    optimizer = parts["adam"] if len(parts) == 1 else optax.partition(parts, kinds)
    if clip is not None:
        clipped = optax.clip_by_global_norm(clip)
        if tables:
            apart = {name: "table" if name in tables else "rest" for name in specs}
            clipped = optax.partition({"table": clipped, "rest": clipped}, apart)
        optimizer = optax.chain(clipped, optimizer)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counts with floats
            return optimizer.update(grads, state, params)

    return Optimizer(optimizer.init, update, lazy)


def _dimensions(spec: Spec) -> MuonDimensionNumbers | None:
    """Which axes of a matrix a product sums over and which it brings. None: not a matrix.

    Stacked layers (a leading L) and the maps of several memories (a leading M) are matrices apart.
    """
    apart = len(spec.axes) - len(spec.axes.lstrip("LM"))
    inputs = tuple(i for i, letter in enumerate(spec.axes) if letter in spec.fan_in)
    outputs = tuple(i for i, letter in enumerate(spec.axes) if letter not in spec.fan_in and i >= apart)
    return MuonDimensionNumbers(inputs, outputs) if inputs and outputs else None
