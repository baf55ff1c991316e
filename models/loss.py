"""The cross-entropy of a language model, without ever holding all logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models.lm import LanguageModel

ASK_NOTHING = -100  # the label of a position that is not asked


class Scores(NamedTuple):
    """Of each asked position, float32; 0 where nothing is asked. [B, T], or [B, n] with `labelled=n`."""

    nll: Array  # natural-log loss
    correct: Array  # 1 where the likeliest word is the label
    squared_log_z: Array  # for the z-loss
    asked: Array  # 1 where there is a label
    labels: Array  # int32


def score(
    model: LanguageModel, hidden_BTD: Array, labels_BT: Array, *, labelled: int | None = None, limit: int = 2**24
) -> Scores:
    """Scores hidden states against labels (-100: not asked).

    labelled: the most labels that a row has, where labels are sparse: then only those positions are projected to the
    vocabulary. limit: floats of logits held at once; more positions are taken in turn, recomputed in the backward pass.
    """
    if labelled is not None and labelled < labels_BT.shape[1]:
        first = jnp.argsort(labels_BT == ASK_NOTHING, axis=1, stable=True)[:, :labelled]
        hidden_BTD = jnp.take_along_axis(hidden_BTD, first[..., None], 1)
        labels_BT = jnp.take_along_axis(labels_BT, first, 1)
    B, T, D = hidden_BTD.shape

    def part(hidden_BTD: Array, labels_BT: Array) -> Scores:
        logits = model.logits(hidden_BTD)
        asked = labels_BT != ASK_NOTHING
        label = jnp.where(asked, labels_BT, 0)
        log_z = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, label[..., None], -1)[..., 0]
        best = jnp.argmax(logits, -1).astype(labels_BT.dtype)

        def only(x: Array) -> Array:
            return jnp.where(asked, x, 0.0)

        hit = (best == label).astype(logits.dtype)
        return Scores(only(log_z - chosen), only(hit), only(log_z**2), asked.astype(logits.dtype), labels_BT)

    size = max(limit // (B * model.config.W), 1)  # positions of every row at once
    if size >= T:
        return part(hidden_BTD, labels_BT)
    pieces = -(-T // size)
    size = -(-T // pieces)

    def cut(x: Array, filler: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - T)] + [(0, 0)] * (x.ndim - 2), constant_values=filler)
        return jnp.moveaxis(x.reshape(B, pieces, size, *x.shape[2:]), 1, 0)

    scores = jax.lax.map(jax.checkpoint(lambda xs: part(*xs)), (cut(hidden_BTD, 0), cut(labels_BT, ASK_NOTHING)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T], scores)
