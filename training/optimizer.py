"""An optimiser from its config, over parameters by name."""

import optax
from optax.contrib import MuonDimensionNumbers, muon

from models.parameters import Spec
from training.experiment import AdamW, Muon, Schedule


def learning_rate(peak: float, schedule: Schedule, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate. The first step already moves: warm-up counts from 1."""
    warmup = min(schedule.warmup, steps)
    rest = max(steps - warmup, 1)
    if schedule.shape == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=schedule.final)
    elif schedule.shape == "wsd":
        down = max(round(schedule.decay * steps), 1)
        after = optax.linear_schedule(peak, schedule.final * peak, down, transition_begin=max(rest - down, 0))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def build_optimizer(
    config: AdamW | Muon, steps: int, clip: float | None, specs: dict[str, Spec]
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimiser. Weight decay spares what asks for it (`decay=False`)."""
    decayed = {name: spec.decay for name, spec in specs.items()}
    schedule = learning_rate(config.lr, config.schedule, steps)
    if isinstance(config, AdamW):
        optimizer = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
        )
    else:
        optimizer = muon(
            schedule,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            weight_decay_mask=decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=learning_rate(config.adam_lr or config.lr, config.schedule, steps),
            muon_weight_dimension_numbers={name: _dimensions(spec) for name, spec in specs.items()},
            consistent_rms=0.2,
        )
    return optimizer if clip is None else optax.chain(optax.clip_by_global_norm(clip), optimizer)


def _dimensions(spec: Spec) -> MuonDimensionNumbers | None:
    """Which axes of a matrix a product sums over and which it brings; stacked layers are apart. None: not a matrix."""
    inputs = tuple(i for i, letter in enumerate(spec.axes) if letter in spec.fan_in)
    outputs = tuple(i for i, letter in enumerate(spec.axes) if letter not in spec.fan_in and letter != "L")
    return MuonDimensionNumbers(inputs, outputs) if inputs and outputs else None
