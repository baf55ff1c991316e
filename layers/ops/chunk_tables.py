"""Tables of a chunk: how the weights at each of its tokens are made of those at its start and of the tokens' steps.

For `layers.ops.test_time`, of one matrix of one head:

    S_t = momentum_t S_{t-1} + U_t        A_t = keep_t A_{t-1} + apply_t S_t
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from layers.ops.precision import HIGHEST


class Open(NamedTuple):
    """A Gate that says all but momentum, shut at padding; [B, T, H, .], or [C, .] of one head's chunk."""

    lr: Array
    log_keep: Array | None
    log_momentum: Array | None
    apply: Array


class Table(NamedTuple):
    """How the A of each token, and A and S at the end, are made of A_0, S_0 and the U of the chunk; g is 1 or outputs.

    A_t = own_t A_0 + past_t S_0 + sum_i mix_ti U_i
    """

    own: Array  # [C, g]
    past: Array | None
    mix: Array  # [C, C, g]
    end: tuple[Array, Array | None, Array]  # the same of the last A
    momentum: tuple[Array, Array] | None  # and of the last S: of S_0 [g], of each U [C, g]


def fade(log: Array) -> tuple[Array, Array]:
    """[C, g] -> product up to each token [C, g], and between tokens [t, j, g]: after j up to t, for j <= t, else 0."""
    C = log.shape[0]
    tril = jnp.tril(jnp.ones((C, C), log.dtype))
    total = jnp.matmul(tril, log, precision=HIGHEST)
    gap = total[:, None] - total[None]
    return jnp.exp(total), jnp.exp(jnp.where(tril[..., None] > 0, gap, -jnp.inf))


def fading(gate: Open, pre: bool) -> Table:
    """Of momentum and decay. pre: a token reads the weights before its own step."""
    apply, ones = gate.apply, jnp.ones_like(gate.lr[:, :1])
    own, kept = fade(jnp.zeros_like(ones) if gate.log_keep is None else gate.log_keep)
    mix, past, momentum = kept * apply[None], None, None
    if gate.log_momentum is not None:
        held, holds = fade(gate.log_momentum)
        past = jnp.einsum("tlg,lg->tg", *same(mix, held), precision=HIGHEST)
        momentum = held[-1:], holds[-1]
        mix = jnp.einsum("tlg,lig->tig", *same(mix, holds), precision=HIGHEST)
    end = own[-1:], None if past is None else past[-1:], mix[-1]
    if pre:
        own = jnp.concatenate([jnp.ones_like(own[:1]), own[:-1]])
        mix = jnp.concatenate([jnp.zeros_like(mix[:1]), mix[:-1]])
        past = None if past is None else jnp.concatenate([jnp.zeros_like(past[:1]), past[:-1]])
    return Table(own, past, mix, end, momentum)


def same(a: Array, b: Array) -> tuple[Array, Array]:
    g = max(a.shape[-1], b.shape[-1])
    return jnp.broadcast_to(a, (*a.shape[:-1], g)), jnp.broadcast_to(b, (*b.shape[:-1], g))


def averaging(gate: Open, row_C: Array, pre: bool) -> Table:
    """TTT's: A_t = anchor + row_t (S_0 + sum of U up to t); slots may be empty, and the last A is the last token's."""
    C = row_C.shape[0]
    filled = gate.apply > 0  # [C, 1]
    last = jnp.max(jnp.where(filled[:, 0], jnp.arange(C), -1))
    tril = jnp.tril(jnp.ones((C, C), row_C.dtype), -1 if pre else 0)[..., None]
    one, row = jnp.ones((C, 1), row_C.dtype), row_C[:, None]
    if pre:
        row = jnp.concatenate([jnp.zeros_like(row[:1]), row[:-1]])
    end_row = row_C[jnp.maximum(last, 0)][None, None]
    end = one[:1], end_row, end_row * one  # for a chunk without tokens: test_time leaves A alone
    return Table(one, row, row[:, None] * tril, end, (one[:1], one))
