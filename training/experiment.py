"""An experiment on paper: what is trained, on what, how, and over which devices."""

import dataclasses
from typing import Any, Literal

from layers.layer import above_zero, one_of, positive
from models.lm import LM
from training.data import DataConfig


def _check_tables(config: Any) -> None:
    one_of(config)
    if config.lazy_tables and config.tables != "adam":
        name = type(config).__name__
        raise ValueError(
            f"{name}.lazy_tables is True and {name}.tables {config.tables!r}, which balances all rows of a table "
            'against each other: use "adam"'
        )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a factor of its peak: warm-up, then a shape.

    warmup: steps from 0 to the peak. shape: "cosine" falls to `final` over the run; "wsd" stays at the peak and falls
    linearly over the last `decay` fraction of the run; "constant" stays.
    """

    warmup: int = 100
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    final: float = 0.1
    decay: float = 0.2

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError(f"Schedule.warmup is {self.warmup}: it must be at least 0 steps")
        for field in ("final", "decay"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Schedule.{field} is {getattr(self, field)}: it must be a fraction, 0 to 1")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101); norms, biases and gates' constants do not decay.

    table_lr: of tables that are looked up (Engram, product keys), in units of lr; they do not decay either.
    tables: "adam"; or "sinkhorn", momentum with steps balanced over rows and columns, of half the memory
        (training/sinkhorn.py).
    lazy_tables: a step touches the rows that its batch looks up and no others, in time and memory that do not grow with
        the table (training/lazy.py). Each row then has an Adam of its own, which rests while the row is not asked for;
        in the usual Adam, which counts a row's gradient as 0 then, such rows go on moving. Train.ema leaves those
        tables out.
    """

    lr: float = 3e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    table_lr: float = 5.0
    tables: Literal["adam", "sinkhorn"] = "adam"
    lazy_tables: bool = False
    schedule: Schedule = Schedule()

    def __post_init__(self):
        above_zero(self, "lr", "table_lr")
        _check_tables(self)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (orthogonalised momentum, Jordan 2024) for matrices, AdamW for embeddings and all else.

    lr: of the matrices; their updates are scaled to a root mean square of 0.2 lr, so that it reads as an AdamW rate
    (arXiv 2502.16982). adam_lr: of all else; None for lr. table_lr: of tables, as in AdamW, in units of adam_lr.
    tables, lazy_tables: as in AdamW.
    """

    lr: float = 5e-3
    adam_lr: float | None = None
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    table_lr: float = 5.0
    tables: Literal["adam", "sinkhorn"] = "adam"
    lazy_tables: bool = False
    schedule: Schedule = Schedule()

    def __post_init__(self):
        above_zero(self, "lr", "table_lr")
        _check_tables(self)


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, and what is written when.

    steps: optimiser steps. log_every, eval_every, checkpoint_every: in steps; 0 for never (a run always evaluates and
        checkpoints at its end).
    eval_batches: held-out batches an evaluation reads; None for all.
    clip: largest norm of the gradient; None for no clipping.
    accumulate: parts that a batch is taken in, their gradients summed.
    ema: decay of a running average of the parameters, evaluated instead of them; None for none.
    z_loss: weight of the mean squared log-partition of the logits.
    masked: weight of the loss of hidden tokens, where the data has a region that is read ahead (JRT).
    bad_steps: steps in a row with a non-finite loss or gradient before the run stops. Such a step changes nothing.
    keep_last, keep_best: checkpoints kept, newest and by held-out loss.
    seed: of parameters and of the data's order.
    tensorboard: also write scalars for TensorBoard into the run's folder.
    wandb: name of a Weights & Biases project to write to; None for none.
    """

    steps: int = 1000
    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    eval_batches: int | None = 32
    clip: float | None = 1.0
    accumulate: int = 1
    ema: float | None = None
    z_loss: float = 0.0
    masked: float = 0.25
    bad_steps: int = 20
    keep_last: int = 2
    keep_best: int = 1
    seed: int = 0
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self):
        positive(self, "steps", "accumulate", "bad_steps", "keep_last", "log_every")
        for field in ("eval_every", "checkpoint_every"):
            if getattr(self, field) < 0:
                raise ValueError(f"Train.{field} is {getattr(self, field)}: give steps, or 0 for never")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"Train.ema is {self.ema}: give a decay between 0 and 1, such as 0.999, or None")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices in a grid, and so where all arrays lie (layers/ops/place.py). Sizes of axes; -1 for all that are left.

    data: rows of a batch, each group of devices with parameters of its own.
    fsdp: rows too, but parameters, and what the optimiser has for them, are kept in parts (by width), and put together
        where they are used.
    sequence: tokens of a row.
    model: heads, hidden channels and words. The rows of tables that are looked up lie over `fsdp` and `model`.
    tables: "host" keeps tables and their moments in the host's memory, and sends rows; with optimizer.lazy_tables, and
        one device.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    model: int = 1
    tables: Literal["device", "host"] = "device"
    layout: dataclasses.InitVar[str | None] = None  # of runs saved before there was `fsdp`; no field any more

    def __post_init__(self, layout: str | None):
        one_of(self)
        if layout in ("fsdp", "fsdp+tensor"):
            object.__setattr__(self, "fsdp", self.data)
            object.__setattr__(self, "data", 1)
        elif layout not in (None, "replicated", "tensor"):
            raise ValueError(f"Mesh.layout is {layout!r}: say how many devices share parameters by Mesh.fsdp and model")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run is made of. `description` is the line that `train.py --help` shows.

    parameters: how many the model has: a config states it, a test compares it with the model that is built.
    sample: a prompt that the trained model continues at the end of the run; None for none.
    pod: TPUs that it is meant for and fits, such as v5e:4x4: a config states it, a test compares it with an estimate,
        `python -m tpu.compile` compiles for it. None for what any machine trains.
    """

    description: str
    model: LM
    data: DataConfig
    optimizer: AdamW | Muon = AdamW()
    train: Train = Train()
    mesh: Mesh = Mesh()
    parameters: int | None = None
    sample: str | None = None
    pod: str | None = None

    def __post_init__(self):
        if self.data.B % self.train.accumulate:
            raise ValueError(
                f"train.accumulate is {self.train.accumulate}, which does not divide data.B = {self.data.B}"
            )
        if self.mesh.tables == "host" and not self.optimizer.lazy_tables:
            raise ValueError(
                "mesh.tables is 'host', where a step can reach only the rows of its batch: set "
                "optimizer.lazy_tables to True"
            )
