"""Solving (I + L) X = Y for strictly lower triangular L, the heart of every delta rule read in chunks.

By substitution only. The product (I + N)(I + N²)(I + N⁴)… with N = -L is the same algebra, but its powers explode when
keys repeat or lean the same way: a relative error of 1e9 for a run of one token at beta = 1 (float32, C = 64).

Not by `jax.lax.linalg.triangular_solve` either: on CPU it takes 2.9 times as long (256 matrices of 64 x 64, by eights
in a scan, one core), and two of them running at once wait for each other for ever where the machine has two cores:
LAPACK's batches block a thread of the pool that they wait for.
"""

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.precision import HIGHEST

BLOCK = 8  # diagonal blocks of about this size are inverted row by row


@jax.custom_vjp
def unit_lower_inverse(L: Array) -> Array:
    """(I + L)^-1, [..., C, C]; L is read below its diagonal only.

    Rows are substituted inside diagonal blocks, then blocks merge two by two: the inverses P, Q of two neighbours and
    X, the block below them, make [[P, 0], [-Q X P, Q]]. Matrix products only, and never a power of L.
    """
    C = L.shape[-1]
    size = C
    while size % 2 == 0 and size > BLOCK:
        size //= 2
    lower = _blocks(L, size)
    eye = jnp.eye(size, dtype=L.dtype)
    rows = [jnp.broadcast_to(eye[0], (*lower.shape[:-2], size))]
    for i in range(1, size):
        above = jnp.sum(lower[..., i, :i, None] * jnp.stack(rows, -2), -2)
        rows.append(jnp.broadcast_to(eye[i], above.shape) - above)
    inverse = jnp.stack(rows, -2)
    while size < C:
        P, Q = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        X = jnp.matmul(Q, jnp.matmul(_blocks(L, size, below=1), P, precision=HIGHEST), precision=HIGHEST)
        top = jnp.concatenate([P, jnp.zeros_like(P)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([-X, Q], -1)], -2)
        size *= 2
    return inverse[..., 0, :, :]


def _blocks(L: Array, size: int, below: int = 0) -> Array:
    """The diagonal blocks, or every second of those just below them: [..., n, size, size]."""
    n = L.shape[-1] // size
    grid = L.reshape(*L.shape[:-2], n, size, n, size)
    return jnp.stack([grid[..., i + below, :, i, :] for i in range(0, n - below, 1 + below)], -3)


def _inverse_forward(L: Array):
    X = unit_lower_inverse(L)
    return X, X


def _inverse_backward(X: Array, dX: Array):
    # d(I + L)^-1 = -X dL X  =>  the cotangent of L is -X^T dX X^T, below the diagonal.
    Xt = jnp.swapaxes(X, -1, -2)
    return (-jnp.tril(jnp.matmul(Xt, jnp.matmul(dX, Xt, precision=HIGHEST), precision=HIGHEST), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@jax.custom_vjp
def solve_unit_lower(L: Array, Y: Array) -> Array:
    """X with (I + L) X = Y; L [..., C, C] is read below its diagonal only, Y and X are [..., C, V]."""
    return jnp.matmul(unit_lower_inverse(L), Y, precision=HIGHEST)


def _solve_forward(L: Array, Y: Array):
    inverse = unit_lower_inverse(L)
    X = jnp.matmul(inverse, Y, precision=HIGHEST)
    return X, (inverse, X)


def _solve_backward(saved, dX: Array):
    # (I + L) X = Y  =>  dY = (I + L)^-T dX  and  dL = -dY X^T, below the diagonal.
    inverse, X = saved
    dY = jnp.matmul(jnp.swapaxes(inverse, -1, -2), dX, precision=HIGHEST)
    return -jnp.tril(jnp.matmul(dY, jnp.swapaxes(X, -1, -2), precision=HIGHEST), -1), dY


solve_unit_lower.defvjp(_solve_forward, _solve_backward)
