"""Momentum whose step is balanced over rows and columns: tables trained with one buffer rather than Adam's two.

    M = b M + G ;  U = G + b M  (Nesterov)
    rows of U whose norm is at most 1e-3 of the rows' mean norm become 0
    TURNS times in turn, from the first: each row divided by its norm; each column divided by its norm
    table = table - 0.18 lr sqrt(K) U

TURNS is odd, so that rows have the last word: each that is not 0 moves by entries with a root mean square of 0.18 lr,
however often it was asked for, and no channel of the rows has more of the step than another. As notes on the public
code of DeepSeek-V4.1 describe it for its Engram tables; that n in their sqrt(n) is K, a row's width, is our reading.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

TURNS = 11
LEAST = 1e-3  # of the mean norm: rows below it do not move
SCALE = 0.18


def balance(u_WK: Array, turns: int = TURNS) -> Array:
    """[..., W, K] -> the same, its rows and columns divided by their norms in turn; each table of a stack by itself."""
    norm_W1 = jnp.linalg.norm(u_WK, axis=-1, keepdims=True)
    u_WK = jnp.where(norm_W1 > LEAST * jnp.mean(norm_W1, -2, keepdims=True), u_WK, 0)
    for turn in range(turns):
        norm = jnp.linalg.norm(u_WK, axis=-2 if turn % 2 else -1, keepdims=True)
        u_WK = jnp.where(norm > 0, u_WK / jnp.where(norm > 0, norm, 1), 0)
    return u_WK


def sinkhorn_momentum(rate: optax.Schedule, momentum: float = 0.95) -> optax.GradientTransformation:
    """rate: step -> learning rate. Its state is M, and the count of steps."""

    def balanced(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u: SCALE * u.shape[-1] ** 0.5 * balance(u), updates)

    return optax.chain(
        optax.trace(momentum, nesterov=True), optax.stateless(balanced), optax.scale_by_learning_rate(rate)
    )
