"""The training step and the evaluation step: pure functions over parameters by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from layers.layer import Tokens
from models.lm import rows_read
from models.loss import ASK_NOTHING, score_tokens, shares
from models.parameters import Params, Structure
from training.experiment import Experiment
from training.lazy import Read
from training.optimizer import Optimizer


class DeviceBatch(NamedTuple):
    """A training.data.Batch on the devices."""

    ids_BT: Array
    pos_BT: Array
    labels_BT: Array
    prefix_BT: Array | None = None


State = dict[str, Any]  # params, opt, counters; tables, of which an optimiser reads few rows; ema where there is one
LOG2 = float(np.log(2))


Sums = tuple[Array, dict[str, Array], Params]
Looked = tuple[dict[str, Array], Params]


class Trained(NamedTuple):
    """What a step differentiates: parameters, and the zeros that stand for rows of lent tables."""

    params: Params
    slots: Params | None


class Said(NamedTuple):
    """sums: scalars by name. rows: those of lent tables, by repeat."""

    sums: dict[str, Array]
    rows: dict[str, list[Array]]


def init_state(experiment: Experiment, params: Params, optimizer: Optimizer) -> State:
    """The state before the first step. counters, int32: `step`, `skipped` (bad steps in all), `bad` (in a row)."""
    counters = {name: jnp.zeros([], jnp.int32) for name in ("step", "skipped", "bad")}
    tables, rest = ({}, params) if optimizer.lazy is None else optimizer.lazy.apart(params)
    state = {"params": params, "opt": optimizer.init(rest), "counters": counters}
    if optimizer.lazy is not None:
        state["tables"] = optimizer.lazy.init(tables)
    if experiment.train.ema is not None:
        state["ema"] = jax.tree.map(jnp.copy, rest)
    return state


def shown(state: State) -> Params:
    """The parameters to evaluate and to sample from: averages where there are any."""
    return {**state.get("params", {}), **state.get("ema", {})}


def train_step(
    experiment: Experiment,
    structure: Structure,
    optimizer: Optimizer,
    token_bytes: np.ndarray,
    labelled: int | None,
) -> Callable[[State, DeviceBatch], tuple[State, dict[str, Array]]]:
    """(state, batch) -> (state, metrics). Jit it with the state donated.

    The loss is the mean over the labelled positions of the whole batch, however it is cut into parts; where a region is
    read ahead, hidden tokens in it and next tokens after it have a mean each, and accuracy and bits per byte are of the
    latter. A step with a non-finite loss or gradient leaves parameters, optimiser and average as they were, and is
    counted.
    """
    train, ema, lazy = experiment.train, experiment.train.ema, optimizer.lazy

    def objective(trained: Trained, tables: Params, batch: DeviceBatch, weights: Weights) -> tuple[Array, Said]:
        """tables: those that are not differentiated; but what is read of them is, through trained.slots."""
        lent: dict[str, Any] = {} if lazy is None else lazy.lend(tables, trained.slots)
        model = structure.module({**trained.params, **lent})
        s, aux = score_tokens(
            model,
            Tokens(batch.ids_BT, batch.pos_BT),
            batch.labels_BT,
            labelled=labelled,
            prefix_BT=batch.prefix_BT,
        )
        ahead, z = s.ahead, train.z_loss * jnp.sum(s.squared_log_z) / weights.asked
        if ahead is None:
            nll = jnp.sum(s.nll)
            loss = nll / weights.asked + z
        else:
            loss = jnp.sum(s.nll * jnp.where(ahead, weights.hidden, weights.next)) + z
            s = s._replace(**{name: jnp.where(ahead, 0, getattr(s, name)) for name in ("nll", "correct", "asked")})
            nll = jnp.sum(s.nll)
        extra: dict[str, Array] = {}
        for name, value in aux.items():
            kind = name.split("/", 1)[1]
            if kind.startswith("loss/"):
                extra[name] = jnp.sum(value.astype(jnp.float32))  # of a scanned stage: the sum over its repeats
                loss = loss + extra[name] / train.accumulate
            elif value.dtype != jnp.bool_ and not kind.startswith("rows/"):
                extra[name] = jnp.mean(value.astype(jnp.float32))
        text = jnp.sum(jnp.take(jnp.asarray(token_bytes, jnp.float32), jnp.maximum(s.labels, 0)) * s.asked)
        sums = {"nll": nll, "correct": jnp.sum(s.correct), "bytes": text} | {
            f"aux/{name}": value / train.accumulate for name, value in extra.items()
        }
        return loss, Said(sums, {} if lazy is None else rows_read(aux))

    def slopes(params: Params, tables: Params, batch: DeviceBatch, weights: Weights) -> tuple[Sums, Looked]:
        """(what adds up over the parts of a batch: loss, sums and gradients; what does not: rows and their slopes)"""
        slots: Params = {}
        if lazy is not None:
            abstract = jax.eval_shape(objective, Trained(params, None), tables, batch, weights)
            slots = lazy.slots(abstract[1].rows)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        (loss, said), grads = value_and_grad(Trained(params, slots), tables, batch, weights)
        looked = ({}, {}) if lazy is None else (lazy.keys(said.rows), grads.slots)
        return (loss, said.sums, grads.params), looked

    def gradients(params: Params, tables: Params, batch: DeviceBatch) -> tuple[Sums, Looked]:
        weights = _weights(batch, train.masked)
        if train.accumulate == 1:
            return slopes(params, tables, batch, weights)
        # Every n-th row makes a part: where rows are split over devices, each has its share of every part.
        parts = jax.tree.map(lambda x: x.reshape(-1, train.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, part: DeviceBatch) -> tuple[Any, Any]:
            sums, looked = slopes(params, tables, part, weights)
            return jax.tree.map(jnp.add, total, sums), looked

        shapes, _ = jax.eval_shape(slopes, params, tables, jax.tree.map(lambda x: x[0], parts), weights)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)

    def step(state: State, batch: DeviceBatch) -> tuple[State, dict[str, Array]]:
        chex.assert_rank(jax.tree.leaves(batch), 2)
        chex.assert_equal_shape(jax.tree.leaves(batch))
        tables, params = ({}, state["params"]) if lazy is None else lazy.apart(state["params"])
        (loss, said, grads), looked = gradients(params, tables, batch)
        reads: dict[str, Read] = {} if lazy is None else lazy.read(*looked)
        norm = optax.tree.norm((grads, [read.slopes_NK for read in reads.values()]))
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt = optimizer.update(grads, state["opt"], params)
        new = {"params": optax.apply_updates(params, updates), "opt": opt}
        if ema is not None:
            new["ema"] = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state["ema"], new["params"])
        kept = {name: state[name] for name in new} | {"params": params}
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, kept)
        if lazy is not None:
            after, new["tables"] = lazy.update(reads, state["tables"], tables, good, structure.spread)
            new["params"] = {name: (after if name in after else new["params"])[name] for name in state["params"]}
        old, bad = state["counters"], 1 - good.astype(jnp.int32)
        new["counters"] = {
            "step": old["step"] + 1,
            "skipped": old["skipped"] + bad,
            "bad": (old["bad"] + 1) * bad,
        }
        metrics = {
            "loss": loss,
            "accuracy": said["correct"] / _asked(batch, ahead=False),
            "grad_norm": norm,
            "skipped": new["counters"]["skipped"],
            "bad": new["counters"]["bad"],
        }
        if token_bytes.any():  # words that stand for text
            metrics["bits_per_byte"] = said["nll"] / LOG2 / jnp.maximum(said["bytes"], 1)
        return new, metrics | {name: value for name, value in said.items() if name.startswith("aux/")}

    return step


class Weights(NamedTuple):
    """Of a whole batch. asked: labels. next, hidden: what the loss of one weighs (models.loss.shares)."""

    asked: Array
    next: Array
    hidden: Array


def _weights(batch: DeviceBatch, masked: float) -> Weights:
    asked = _asked(batch)
    if batch.prefix_BT is None:
        return Weights(asked, 1 / asked, jnp.zeros_like(asked))
    return Weights(asked, *shares(batch.labels_BT, batch.prefix_BT, masked))


def _asked(batch: DeviceBatch, ahead: bool = True) -> Array:
    """How many labels a batch has (not ahead: those after a region); 1 where it has none, so that means stay finite."""
    asked = batch.labels_BT != ASK_NOTHING
    if batch.prefix_BT is not None and not ahead:
        asked &= ~batch.prefix_BT
    return jnp.maximum(jnp.sum(asked), 1).astype(jnp.float32)


def eval_step(
    structure: Structure, token_bytes: np.ndarray, labelled: int | None = None, skip: tuple[str, ...] = ()
) -> Callable[[Params, DeviceBatch], dict[str, Array]]:
    """(params, batch) -> sums over the batch: nll, correct and asked by position [T] (or [labelled]), and bytes."""

    def evaluate(params: Params, batch: DeviceBatch) -> dict[str, Array]:
        model = structure.module(params)
        tokens = Tokens(batch.ids_BT, batch.pos_BT)
        s, _ = score_tokens(model, tokens, batch.labels_BT, labelled=labelled, skip=skip, prefix_BT=batch.prefix_BT)
        text = jnp.take(jnp.asarray(token_bytes, jnp.float32), jnp.maximum(s.labels, 0)) * s.asked
        sums = {"nll": s.nll, "correct": s.correct, "asked": s.asked, "bytes": text}
        return {name: jnp.sum(value, 0) for name, value in sums.items()}

    return evaluate
