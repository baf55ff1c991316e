"""Product keys (Lample et al. 2019, arXiv 1907.05242): the best of n² slots, found among 2 n keys.

    score_ij = q1 . row_i + q2 . column_j        S = the `top` slots i n + j of highest score
    w = softmax over S of score                  y = sum over heads and S of w · value

q1 and q2 are the halves of a head's query. "naive" is the definition: a score for each of the n² slots. "product" is
equal to it. A slot of S has its row among the `top` best rows and its column among the `top` best columns: else `top`
slots of the same column, or row, would score higher. For the same reason the a-th best row and the b-th best column
meet in S only if a b <= top, which leaves about top · ln(top) pairs of the top² to look at.

Of equal scores the first slot is chosen, where sums do not round (a sum that rounds may make equals of what were none).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.ops.precision import HIGHEST

GROUP = 4  # scores of which the largest stands for all, in a first round


def product_keys(
    q_BTHK: Array, row_HSK: Array, column_HSK: Array, top: int, *, implementation: str = "auto"
) -> tuple[Array, Array]:
    """(slots [B, T, H, top] int32, the best first; their softmaxed scores, in the dtype of q, which is float32 or 64).

    row_HSK, column_HSK: n keys of each head, for the first and the second half of its query: K is half of q's.
    implementation: "naive" | "product" | "auto". ValueError where sizes do not fit.

    The choice has no gradient, the weights have.
    """
    H, n, K = row_HSK.shape
    if q_BTHK.shape[2:] != (H, 2 * K) or column_HSK.shape != row_HSK.shape or top > n:
        raise ValueError(
            f"product_keys: queries {q_BTHK.shape[2:]}, keys {row_HSK.shape} and {column_HSK.shape}, "
            f"{top} slots: queries must be two keys wide, and slots at most as many as keys"
        )
    if implementation not in ("naive", "product", "auto"):
        raise ValueError(f"product_keys: implementation is {implementation!r}, not naive, product or auto")
    first, second = jnp.split(q_BTHK, 2, -1)
    row = jnp.einsum("BTHK,HSK->BTHS", first, row_HSK.astype(q_BTHK.dtype), precision=HIGHEST)
    column = jnp.einsum("BTHK,HSK->BTHS", second, column_HSK.astype(q_BTHK.dtype), precision=HIGHEST)
    if implementation == "naive":
        score = (row[..., :, None] + column[..., None, :]).reshape(*row.shape[:-1], n * n)
        slot = jnp.argsort(-jax.lax.stop_gradient(score), -1, stable=True)[..., :top].astype(jnp.int32)
        return slot, jax.nn.softmax(jnp.take_along_axis(score, slot, -1), -1)
    slot = best_slots(row, column, top)
    score = jnp.take_along_axis(row, slot // n, -1) + jnp.take_along_axis(column, slot % n, -1)
    return slot, jax.nn.softmax(score, -1)


def best_slots(row: Array, column: Array, top: int) -> Array:
    """The `top` largest of row_i + column_j, as i n + j in int32, the largest first: [..., n] -> [..., top]."""
    n = row.shape[-1]
    row_score, i = best(row, top)
    column_score, j = best(column, top)
    a, b = np.array([(a, b) for a in range(top) for b in range(top // (a + 1))], np.int32).T
    return _best(row_score[..., a] + column_score[..., b], i[..., a] * n + j[..., b], top)[1]


def best(score: Array, top: int) -> tuple[Array, Array]:
    """(the `top` largest over the last axis, the largest first and of equals the first; their places, int32).

    No gradient. lax.top_k takes 0.5 to 0.8 of the time on CPU (8 of 160, 32 of 1,024), but a mesh gathers all rows of
    the batch for it. routing.largest keeps a mask for each, too much for so many. A group's largest stands for it in a
    first round: what is among the best lies in the groups that do best.
    """
    n, rest = score.shape[-1], jax.lax.stop_gradient(score)
    if 3 * n <= 4 * GROUP * top:
        return _best(rest, _count(n, rest.ndim), top)
    groups = -(-n // GROUP)
    fill = [(0, 0)] * (rest.ndim - 1) + [(0, groups * GROUP - n)]
    rest = jnp.pad(rest, fill, constant_values=-jnp.inf).reshape(*rest.shape[:-1], groups, GROUP)
    _, group = _best(jnp.max(rest, -1), _count(groups, rest.ndim - 1), top)
    place = group[..., None] * GROUP + _count(GROUP, rest.ndim)
    flat = *group.shape[:-1], top * GROUP
    return _best(jnp.take_along_axis(rest, group[..., None], -2).reshape(flat), place.reshape(flat), top)


def _count(n: int, ndim: int) -> Array:
    return jnp.arange(n, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (-1,))


def _best(score: Array, place: Array, top: int) -> tuple[Array, Array]:
    """One maximum after the other; of equals that of the lowest place (int32, none twice)."""
    nowhere = jnp.iinfo(jnp.int32).max

    def step(rest: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        highest = jnp.max(rest, -1, keepdims=True)  # and no argmax, which XLA on CPU does a number at a time
        first = jnp.min(jnp.where(rest == highest, place, nowhere), -1, keepdims=True)
        return jnp.where(place == first, -jnp.inf, rest), (highest[..., 0], first[..., 0])

    _, (score, place) = jax.lax.scan(step, jax.lax.stop_gradient(score), length=top)
    return jnp.moveaxis(score, 0, -1), jnp.moveaxis(place, 0, -1)


def usage(slot_BTR: Array, weight_BTR: Array, slots: int) -> tuple[Array, Array]:
    """(share of the slots with any weight, KL of the slots' weights to uniform: 0 for all alike, log(slots) for one).

    Both in the dtype of the weights; of a batch without any weight 0 and log(slots). Lample et al., section 4.
    """
    total_W = jnp.zeros(slots, weight_BTR.dtype).at[slot_BTR].add(weight_BTR)
    p_W = total_W / jnp.maximum(jnp.sum(total_W), jnp.finfo(total_W.dtype).tiny)
    used = jnp.mean((total_W > 0).astype(total_W.dtype))
    return used, jnp.log(jnp.asarray(slots, p_W.dtype)) + jnp.sum(jax.scipy.special.xlogy(p_W, p_W))
