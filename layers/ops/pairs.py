"""Products of queries and keys that fade by channel, with every exponent at most 0.

    P_ij = sum_d x_id k_jd e^{X_id - G_jd}      for j <= i (inclusive rows) or j < i

G is the running sum of log decays up to and including a token, from where its segment begins; X is G itself, or G
without the token's own decay. Pairs of two segments are 0.
Writing this as (x e^X)(k e^-G)^T overflows float32 as soon as a chunk decays by e^-88. Here pairs are split by halves:
for rows in the second half of a block and columns in its first, the reference is G at the last column, and both factors

    x_i e^{X_i - G_ref}   and   k_j e^{G_ref - G_j}

are at most 1 in their exponentials whatever the decay; each half is then split again. Every level is a batch of matrix
products, and the last one (single tokens) needs no exponential at all.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from layers.ops.precision import HIGHEST

SMALL = 4  # blocks below this size are multiplied elementwise: a matrix product of 2 by 2 costs more to call than to do


class Rows(NamedTuple):
    x: Array  # [..., C, K]
    G: Array  # [..., C, K]
    inclusive: bool  # whether a row sees its own column


def decayed_products(rows: list[Rows], k: Array, G: Array, segment: Array | None = None) -> list[Array]:
    """One lower triangular [..., C, C] for each of `rows`; k and G are [..., C, K], segment (None: one) [..., C, 1]."""
    C = k.shape[-2]
    block = C
    while block % 2 == 0 and block > 1:
        block //= 2
    result = [_diagonal(r, k, G, segment, block) for r in rows]
    while block < C:
        k_low, G_low = _halves(k, block)[0], _halves(G, block)[0]
        reference = G_low[..., -1:, :]
        low = high = None
        if segment is not None:  # a pair of one segment has the reference in it too
            before, after = _halves(segment, block)
            low, high = before == before[..., -1:, :], after == before[..., -1:, :]
        k_low = k_low * _exp(reference - G_low, low)
        merged = []
        for r, below in zip(rows, result, strict=True):
            x_high = _halves(r.x, block)[1] * _exp(_halves(r.G, block)[1] - reference, high)
            if block < SMALL:
                corner = jnp.sum(x_high[..., :, None, :] * k_low[..., None, :, :], -1)
            else:
                corner = jnp.matmul(x_high, jnp.swapaxes(k_low, -1, -2), precision=HIGHEST)
            merged.append(_merge(below, corner))
        result, block = merged, 2 * block
    return [p[..., 0, :, :] for p in result]


def _exp(x: Array, mask: Array | None) -> Array:
    """0 where the mask is not; the argument is masked, so that no gradient is 0 times infinity."""
    return jnp.exp(x if mask is None else jnp.where(mask, x, -jnp.inf))


def _halves(x: Array, block: int) -> tuple[Array, Array]:
    """[..., C, K] -> first and second halves of blocks of twice this size, [..., C / 2 block, block, K] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, block, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _diagonal(rows: Rows, k: Array, G: Array, segment: Array | None, block: int) -> Array:
    """The diagonal blocks, [..., C / block, block, block]; `block` is the odd part of C, 1 for a power of two."""
    if block == 1:
        own = jnp.sum(rows.x * k, -1) if rows.inclusive else jnp.zeros_like(k[..., 0])
        # An inclusive row's own exponent is 0 by definition (X = G).
        return own[..., None, None]
    x, X, k, G = (a.reshape(*a.shape[:-2], -1, block, a.shape[-1]) for a in (rows.x, rows.G, k, G))
    seen = jnp.tril(jnp.ones((block, block), bool), 0 if rows.inclusive else -1)
    gap = X[..., :, None, :] - G[..., None, :, :]
    seen = seen.reshape((1,) * (gap.ndim - 3) + (block, block, 1))
    if segment is not None:
        s = segment.reshape(*segment.shape[:-2], -1, block, 1)
        seen = seen & (s[..., :, None, :] == s[..., None, :, :])
    return jnp.sum(x[..., :, None, :] * k[..., None, :, :] * _exp(gap, seen), -1)


def _merge(blocks: Array, corner: Array) -> Array:
    """Diagonal blocks two by two with what stands below them: [..., n, b, b] -> [..., n / 2, 2b, 2b]."""
    first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
