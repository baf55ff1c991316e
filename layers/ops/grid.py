"""Tokens laid out by chunk and slot: chunks of C tokens of a document, counted from its start, wherever that lies.

A token's slot is pos mod C. Padding has none. A row holds N chunks, as many as it needs and then empty ones.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

FEW = 48  # a row of as many chunks, most of them empty, costs nothing
SHORT = 8  # up to this many tokens the definition is the faster form, and the faster to compile


class Grid(NamedTuple):
    """place_BT: chunk · C + slot of each token, N · C for padding. token_NBC: the token of each slot, T for none."""

    place_BT: Array
    token_NBC: Array


def needed(pos: Array, C: int) -> Array:
    """How many chunks the fullest row holds; pos int32 [B, T]."""
    return jnp.max(_chunk(pos, C)) + 1


def in_chunks(pos: Array, C: int, usual: int, by_chunk: Callable, by_token: Callable, *args: Any) -> Any:
    """by_chunk(N, *args) with N chunks a row, as many as rows usually need; by_token(*args) for rows that need more."""
    most = pos.shape[1] + 1  # should every token start a document
    if most <= max(usual, FEW):
        return by_chunk(most, *args)
    return jax.lax.cond(needed(pos, C) <= usual, functools.partial(by_chunk, usual), by_token, *args)


def grid(pos: Array, C: int, N: int) -> Grid:
    """The layout of pos [B, T] in N chunks a row; a row that goes on within a chunk has that as its first."""
    B, T = pos.shape
    place_BT = jnp.where(pos >= 0, _chunk(pos, C) * C + pos % C, N * C)
    t_T, none_P = jnp.arange(T, dtype=jnp.int32), jnp.full(N * C, T, jnp.int32)
    token_BP = jax.vmap(lambda place_T: none_P.at[place_T].set(t_T, mode="drop"))(place_BT)
    return Grid(place_BT, jnp.moveaxis(token_BP.reshape(B, N, C), 1, 0))


def lay(grid: Grid, x: Array, fill: int = 0) -> Array:
    """[B, T, ...] -> [N, B, C, ...], `fill` where there is no token."""
    N, B, C = grid.token_NBC.shape
    token_BP = jnp.moveaxis(grid.token_NBC, 0, 1).reshape(B, N * C)
    x = jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    x = jnp.take_along_axis(x, token_BP.reshape(token_BP.shape + (1,) * (x.ndim - 2)), 1)
    return jnp.moveaxis(x.reshape(B, N, C, *x.shape[2:]), 1, 0)


def gather(grid: Grid, y: Array) -> Array:
    """[N, B, C, ...] -> [B, T, ...], zeros for padding."""
    N, B, C = grid.token_NBC.shape
    y = jnp.moveaxis(y, 0, 1).reshape(B, N * C, *y.shape[3:])
    y = jnp.pad(y, [(0, 0), (0, 1)] + [(0, 0)] * (y.ndim - 2))
    return jnp.take_along_axis(y, grid.place_BT.reshape(grid.place_BT.shape + (1,) * (y.ndim - 2)), 1)


def _chunk(pos: Array, C: int) -> Array:
    """The chunk of each token, counted in its row."""
    valid = pos >= 0
    count = jnp.cumsum(valid & (pos % C == 0), 1, dtype=jnp.int32)
    goes_on = jnp.any(valid & (count == 0), 1, keepdims=True)
    return jnp.where(valid, count - jnp.where(goes_on, 0, 1), 0)
