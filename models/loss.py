"""The cross-entropy of a language model, without ever holding all logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from layers.layer import Tokens, take
from layers.ops.place import SEQUENCE, held, place, sizes
from models.lm import LanguageModel, Skip

ASK_NOTHING = -100  # the label of a position that is not asked


class Scores(NamedTuple):
    """Of each asked position, float32; 0 where nothing is asked. [B, T]."""

    nll: Array  # natural-log loss
    correct: Array  # 1 where the likeliest word is the label
    squared_log_z: Array  # for the z-loss
    asked: Array  # 1 where there is a label
    labels: Array  # int32
    best: Array  # int32, the likeliest word
    ahead: Array | None = None  # bool, of a region read ahead: a label there is the hidden token itself


def score_tokens(
    model: LanguageModel,
    tokens: Tokens,
    labels_BT: Array,
    *,
    labelled: int | None = None,
    skip: Skip = (),
    prefix_BT: Array | None = None,
) -> tuple[Scores, dict[str, Array]]:
    """A training call, scored: (scores, the layers' aux).

    prefix_BT: bool, a region read ahead; the scores say which of their places are in it.
    labelled: the most labels that a row has, where labels are sparse: then the model's last layers and its head read
    those places alone, and the scores are [B, labelled].
    """
    at_BN = None
    if labelled is not None and labelled < labels_BT.shape[1]:
        # The labelled places first, each kind in its order. (lax.top_k would gather the rows of a mesh.)
        at_BN = jnp.argsort(labels_BT == ASK_NOTHING, axis=1, stable=True)[:, :labelled]
        labels_BT = take(labels_BT, at_BN)
    out = model.hidden(tokens, skip=skip, at_BN=at_BN, prefix_BT=prefix_BT)
    scores = score(model, out.y_BTD, labels_BT)
    if prefix_BT is not None:
        scores = scores._replace(ahead=prefix_BT if at_BN is None else take(prefix_BT, at_BN))
    return scores, out.aux


def score(model: LanguageModel, hidden_BTD: Array, labels_BT: Array, *, limit: int = 2**24) -> Scores:
    """Scores hidden states against labels (-100: not asked).

    limit: floats of logits that a device holds at once; more positions are taken in turn, recomputed in the backward
        pass.
    """
    B, T, D = hidden_BTD.shape

    def part(hidden_BTD: Array, labels_BT: Array, words_WD: Array | None = None) -> Scores:
        logits = model.logits(hidden_BTD, words_WD)
        asked = labels_BT != ASK_NOTHING
        label = jnp.where(asked, labels_BT, 0)
        log_z = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, label[..., None], -1)[..., 0]
        best = jnp.argmax(logits, -1).astype(labels_BT.dtype)

        def only(x: Array) -> Array:
            return jnp.where(asked, x, 0.0)

        hit = (best == label).astype(logits.dtype)
        return Scores(only(log_z - chosen), only(hit), only(log_z**2), asked.astype(logits.dtype), labels_BT, best)

    pieces = -(-held("BTW", (B, T, model.config.W)) // limit)
    if pieces <= 1:
        return part(hidden_BTD, labels_BT)
    # A piece is every so many-th position of each row: where tokens lie over devices, all have a share of every piece.
    own = T // sizes().get(SEQUENCE, 1)
    pieces = next((n for n in range(pieces, 2 * pieces) if own % n == 0), min(pieces, T))
    size = -(-T // pieces)

    def cut(x: Array, filler: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - T)] + [(0, 0)] * (x.ndim - 2), constant_values=filler)
        return jnp.moveaxis(x.reshape(B, size, pieces, *x.shape[2:]), 2, 0)

    words_WD = place(model.words(), "WD")  # sent to all devices once, and not for each piece; their gradient, too
    body = jax.checkpoint(lambda words_WD, xs: part(xs[0], xs[1], words_WD))
    cuts = cut(hidden_BTD, 0), cut(labels_BT, ASK_NOTHING)
    scores = jax.lax.map(functools.partial(body, words_WD), cuts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T], scores)


def shares(labels_BT: Array, ahead_BT: Array, masked: float) -> tuple[Array, Array]:
    """What the loss of one label weighs, float32 scalars: of a next token after the region, of a hidden one within it.

    (L_next + masked · L_hidden) / (1 + masked), L the means of either kind (JRT, arXiv 2407.05483, section 4); what
    there is none of has no weight in the denominator.
    """
    asked = labels_BT != ASK_NOTHING
    after, within = (jnp.sum(asked & where).astype(jnp.float32) for where in (~ahead_BT, ahead_BT))
    weight = jnp.where(after > 0, 1.0, 0.0) + jnp.where(within > 0, masked, 0.0)
    weight = jnp.maximum(weight, 1e-9)
    return 1 / (weight * jnp.maximum(after, 1)), masked / (weight * jnp.maximum(within, 1))
