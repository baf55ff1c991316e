"""Linear attention of which a region is read ahead (prefix linear attention: JRT-RNN, arXiv 2407.05483).

    y_i = q_i^T ( sum_{j <= i} k_j v_j^T  +  sum_{j in region} a_j w_j^T )

k, v are what token j tells the memory when its turn comes; a, w (the paper's k^e, v^e) what a token of the region tells
it before the first token reads: every token sees the whole region, those within it too. The second sum does not depend
on i, so it is a state to begin with. Queries and keys are features already; a column of ones in v and w makes the
normaliser of both sums.
"""

import jax.numpy as jnp
from jax import Array

from layers.ops.linear import linear_recurrence
from layers.ops.precision import HIGHEST, wide
from layers.ops.recurrence import Implementation


def first_document(pos_BT: Array) -> tuple[Array, Array]:
    """(bool [B, T]: of the document that a row begins with, padding aside; bool [B, 1]: it starts in this row)."""
    fresh, valid = pos_BT == 0, pos_BT >= 0
    starts_B1 = jnp.take_along_axis(fresh, jnp.argmax(valid, 1, keepdims=True), 1)
    count_BT = jnp.cumsum(fresh.astype(jnp.int32), 1)
    return valid & (count_BT <= starts_B1.astype(jnp.int32)), starts_B1


def prefix_recurrence(
    q_BTHK: Array,
    k_BTHK: Array,
    v_BTHV: Array,
    a_BTHK: Array,
    w_BTHV: Array,
    prefix_BT: Array,
    *,
    pos: Array,
    state: Array | None = None,
    chunk: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Array, Array]:
    """Returns (y_BTHV in the dtype of v, state_BHKV in float32, or float64 for float64 inputs).

    prefix_BT: bool, the region. A row has one, within the document that it begins with: marks on padding or on a later
    document say nothing. pos: int [B, T], state: [B, H, K, V] or None for zeros, as in layers.ops.linear; a document
    that goes on keeps its state and gets the region besides. implementation: "naive" is the definition, over all pairs
    of tokens; the others are those of layers.ops.recurrence, with the region in the state they begin with.
    """
    dtype = wide(q_BTHK, v_BTHV)
    first_BT, starts_B1 = first_document(pos)
    region_BT = first_BT & prefix_BT
    B, _, H, K = q_BTHK.shape
    before = jnp.zeros((B, H, K, v_BTHV.shape[-1]), dtype)
    if state is not None:
        before = jnp.where(starts_B1[..., None, None], before, state.astype(dtype))
    if implementation == "naive":
        return _naive(q_BTHK, k_BTHK, v_BTHV, a_BTHK, w_BTHV, region_BT, first_BT, pos, before)
    told = jnp.where(region_BT[..., None, None], a_BTHK, 0)  # features: those of a key that is 0 would not be 0
    ahead = jnp.einsum("BTHK,BTHV->BHKV", told, w_BTHV, precision=HIGHEST, preferred_element_type=dtype)
    # One place later, so that the document's first token does not forget what was read ahead.
    later = pos + first_BT.astype(pos.dtype)
    return linear_recurrence(
        q_BTHK, k_BTHK, v_BTHV, state=before + ahead, pos=later, chunk=chunk, implementation=implementation
    )


def _naive(q, k, v, a, w, region_BT, first_BT, pos, before) -> tuple[Array, Array]:
    """The sums over all pairs of tokens t, s. before: [B, H, K, V], of the first document."""
    out, dtype, T = v.dtype, wide(q, v), q.shape[1]
    q, k, v, a, w = (x.astype(dtype) for x in (q, k, v, a, w))
    document_BT = jnp.cumsum((pos == 0).astype(jnp.int32), 1)
    same_BTT = (document_BT[:, :, None] == document_BT[:, None, :]) & (pos >= 0)[:, None, :]
    causal_BTT = same_BTT & jnp.tri(T, dtype=bool)[None]
    ahead_BTT = first_BT[:, :, None] & region_BT[:, None, :]

    def read(keys: Array, values: Array, seen_BTT: Array) -> Array:
        return jnp.einsum("BTHK,BSHK,BTS,BSHV->BTHV", q, keys, seen_BTT.astype(dtype), values, precision=HIGHEST)

    def kept(keys: Array, values: Array, these_BT: Array) -> Array:
        return jnp.einsum("BSHK,BS,BSHV->BHKV", keys, these_BT.astype(dtype), values, precision=HIGHEST)

    recalled = jnp.einsum("BTHK,BHKV->BTHV", q, before, precision=HIGHEST)
    y = read(k, v, causal_BTT) + read(a, w, ahead_BTT) + jnp.where(first_BT[..., None, None], recalled, 0)
    # A row's end remembers its last document; the first one's beginnings too, unless another has started.
    first_B1 = jnp.max(jnp.where(first_BT, document_BT, 0), 1, keepdims=True)
    alone_B = (document_BT[:, -1:] == first_B1)[:, :, None, None]
    after = kept(k, v, same_BTT[:, -1]) + jnp.where(alone_B, before + kept(a, w, region_BT), 0)
    return y.astype(out), after
