"""Solving (I + L) X = Y for strictly lower triangular L, the heart of every delta rule read in chunks.

By substitution only. The product (I + N)(I + N²)(I + N⁴)… with N = -L is the same algebra, but its powers explode when
keys repeat or lean the same way: a relative error of 1e9 for a run of one token at beta = 1 (float32, C = 64).
"""

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.precision import HIGHEST


@jax.custom_vjp
def unit_lower_inverse(L: Array) -> Array:
    """(I + L)^-1, [..., C, C]; L is read below its diagonal only."""
    return _invert(L)


def _invert(L: Array, block: int = 16) -> Array:
    """Rows are substituted inside diagonal blocks, then blocks merge two by two.

    A merge takes the inverses P, Q of two neighbouring diagonal blocks and X, the block below them, to
    [[P, 0], [-Q X P, Q]]: matrix products only, and never a power of L.
    """
    C = L.shape[-1]
    size = C
    while size % 2 == 0 and size > block:
        size //= 2
    lead = L.shape[:-2]

    def diagonal(size: int, shift: int = 0) -> Array:
        """Every (1 + shift)th block of this size that stands `shift` blocks under the diagonal."""
        n = C // size
        blocks = L.reshape(*lead, n, size, n, size)
        step = 1 + shift
        return jnp.stack([blocks[..., i + shift, :, i, :] for i in range(0, n - shift, step)], -3)

    lower = diagonal(size)
    eye = jnp.eye(size, dtype=L.dtype)

    def substitute(i: Array, inverse: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(lower, i, -2, keepdims=True)
        unit = jax.lax.dynamic_index_in_dim(eye, i, 0, keepdims=True)
        row = jnp.broadcast_to(unit, row.shape) - jnp.matmul(row, inverse, precision=HIGHEST)
        return jax.lax.dynamic_update_slice_in_dim(inverse, row, i, -2)

    inverse = jax.lax.fori_loop(0, size, substitute, jnp.zeros_like(lower))
    while size < C:
        P, Q = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        X = jnp.matmul(Q, jnp.matmul(diagonal(size, 1), P, precision=HIGHEST), precision=HIGHEST)
        inverse = jnp.concatenate(
            [jnp.concatenate([P, jnp.zeros_like(P)], -1), jnp.concatenate([-X, Q], -1)], -2
        )
        size *= 2
    return inverse[..., 0, :, :]


def _inverse_forward(L: Array):
    X = _invert(L)
    return X, X


def _inverse_backward(X: Array, dX: Array):
    # d(I + L)^-1 = -X dL X  =>  the cotangent of L is -X^T dX X^T, below the diagonal.
    Xt = jnp.swapaxes(X, -1, -2)
    return (-jnp.tril(jnp.matmul(Xt, jnp.matmul(dX, Xt, precision=HIGHEST), precision=HIGHEST), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _substitute(L: Array, Y: Array, transpose: bool) -> Array:
    if jax.default_backend() == "cpu":  # LAPACK's substitution; accelerators prefer matrix products
        return jax.lax.linalg.triangular_solve(
            L, Y, left_side=True, lower=True, unit_diagonal=True, transpose_a=transpose
        )
    inverse = _invert(L)
    return jnp.matmul(jnp.swapaxes(inverse, -1, -2) if transpose else inverse, Y, precision=HIGHEST)


@jax.custom_vjp
def solve_unit_lower(L: Array, Y: Array) -> Array:
    """X with (I + L) X = Y; L [..., C, C] is read below its diagonal only, Y and X are [..., C, V]."""
    return _substitute(L, Y, transpose=False)


def _forward(L: Array, Y: Array):
    X = _substitute(L, Y, transpose=False)
    return X, (L, X)


def _backward(saved, dX: Array):
    # (I + L) X = Y  =>  dY = (I + L)^-T dX  and  dL = -dY X^T, below the diagonal.
    L, X = saved
    dY = _substitute(L, dX, transpose=True)
    dL = -jnp.tril(jnp.matmul(dY, jnp.swapaxes(X, -1, -2), precision=HIGHEST), -1)
    return dL, dY


solve_unit_lower.defvjp(_forward, _backward)
