"""A loop over the chunks of documents: C tokens each, counted from a document's start, wherever in a row that lies.

A token's slot in its chunk is pos mod C. Padding has none. A row's chunks follow one another, and the loop takes as
many turns as the fullest row has chunks: with documents that start anywhere, only the data knows how many those are.

JAX does not differentiate a loop of unknown length, so this one says how. Going forward it keeps some states, evenly
spread; going backward it takes blocks of chunks, last first, recomputes the states of a block from the kept one before
it, and each chunk as its turn comes. Where a row usually has few chunks every state is kept, and nothing but the chunks
themselves is computed twice; where it has many, about the square root of their number are, and a block is as long.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

FEW = 64  # chunks of which every state is kept
SHORT = 8  # up to this many tokens the definition is the faster form, and the faster to compile

Body = Callable[[Any, Any, Any, Array], tuple[Any, Any]]


class Chunks(NamedTuple):
    """Where the tokens of each chunk are: order[first[i] : first[i + 1]] in its row; T stands for none."""

    order_BT: Array
    first_BN: Array
    lead_BN: Array  # the slot of its first token: 0, or where in a chunk the row goes on
    number: Array  # of the chunks of the fullest row


def chunks_of(pos_BT: Array, C: int) -> Chunks:
    """Of pos int32 [B, T], as in layers.layer.Tokens."""
    _, T = pos_BT.shape
    valid = pos_BT >= 0
    rank = jnp.cumsum(valid, 1, dtype=jnp.int32) - 1
    begins = valid & ((pos_BT % C == 0) | (rank == 0))
    chunk = jnp.cumsum(begins, 1, dtype=jnp.int32) - 1

    def row(valid: Array, rank: Array, begins: Array, chunk: Array, pos: Array) -> tuple[Array, Array, Array]:
        order = jnp.full(T, T, jnp.int32).at[jnp.where(valid, rank, T)].set(jnp.arange(T, dtype=jnp.int32), mode="drop")
        at = jnp.where(begins, chunk, T + 1)
        first = jnp.full(T + 1, rank[-1] + 1, jnp.int32).at[at].set(rank, mode="drop")
        return order, first, jnp.zeros(T + 1, jnp.int32).at[at].set(pos % C, mode="drop")

    return Chunks(*jax.vmap(row)(valid, rank, begins, chunk, pos_BT), jnp.max(chunk) + 1)


def tokens_of(chunks: Chunks, i: Array, C: int) -> Array:
    """The token of each slot of chunk i, [B, C]; T for none."""
    T = chunks.order_BT.shape[1]
    first, end, lead = (a[:, i, None] for a in (chunks.first_BN, chunks.first_BN[:, 1:], chunks.lead_BN))
    at = first - lead + jnp.arange(C, dtype=jnp.int32)[None]
    return jnp.where((at >= first) & (at < end), jnp.take_along_axis(chunks.order_BT, jnp.clip(at, 0, T - 1), 1), T)


def read(x: Array, token_BC: Array, fill: int = 0) -> Array:
    """[B, T, ...] -> [B, C, ...], `fill` where there is no token."""
    index = token_BC.reshape(token_BC.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1, mode="fill", fill_value=fill)


def write(x: Array, token_BC: Array, new: Array) -> Array:
    return jax.vmap(lambda x, t, new: x.at[t].set(new, mode="drop"))(x, token_BC, new)


def over_chunks(
    body: Body, shared: Any, state: Any, xs: Any, pos_BT: Array, C: int, *, most: int | None = None, keep: bool = False
) -> tuple[Any, Any]:
    """(y [B, T, ...], the state at the end); y is zero for padding.

    body(shared, state, x [B, C, ...], pos_BC) -> (state, y [B, C, ...]), trees of arrays, on one chunk of each row: x
    is 0 and pos -1 in slots without a token, and the state of a row without any must come out as it went in. It must
    close over no array. shared, state, xs: trees of floating-point arrays, all of which have gradients.
    most: the number of chunks in a row, if known to be no larger. keep: let the backward pass keep all that it wants,
    which takes `most`.
    """
    chunks = chunks_of(pos_BT, C)
    if keep:
        assert most is not None
        return _kept(body, shared, state, xs, pos_BT, chunks, C, most)
    T = pos_BT.shape[1]
    if most is None:  # documents of two chunks and more are usual
        most = min(T, -(-3 * T // (2 * C)) + 4)
    return _loop(body, C, most, usual=min(most, -(-T // C)))(shared, state, xs, pos_BT, chunks)


def _kept(body: Body, shared: Any, state: Any, xs: Any, pos_BT: Array, chunks: Chunks, C: int, N: int):
    token_NBC = jax.vmap(lambda i: tokens_of(chunks, i, C))(jnp.arange(N, dtype=jnp.int32))
    parts = jax.tree.map(lambda x: jax.vmap(lambda t: read(x, t))(token_NBC), xs)
    pos_NBC = jax.vmap(lambda t: read(pos_BT, t, -1))(token_NBC)
    state, y = jax.lax.scan(lambda state, part: body(shared, state, *part), state, (parts, pos_NBC))
    token_BP = jnp.moveaxis(token_NBC, 0, 1).reshape(pos_BT.shape[0], -1)

    def spread(y: Array) -> Array:
        y = jnp.moveaxis(y, 0, 1).reshape(*token_BP.shape, *y.shape[3:])
        return write(jnp.zeros((*pos_BT.shape, *y.shape[2:]), y.dtype), token_BP, y)

    return jax.tree.map(spread, y), state


def _loop(body: Body, C: int, most: int, usual: int) -> Callable[..., tuple[Any, Any]]:
    """most: how many turns there is room for; more are possible, and slower to differentiate if they are many more."""
    body = jax.jit(body, inline=True)  # traced once for all that follows: a body may hold a loop of its own
    slots = most if most <= FEW else math.isqrt(most - 1) + 1  # for states that are kept
    block = 1 if most <= FEW else slots

    def turn(shared: Any, state: Any, xs: Any, pos_BT: Array, token_BC: Array) -> tuple[Any, Any]:
        return body(shared, state, jax.tree.map(lambda x: read(x, token_BC), xs), read(pos_BT, token_BC, -1))

    def empty(shared: Any, state: Any, xs: Any, pos_BT: Array, chunks: Chunks) -> Any:
        token_BC = jax.ShapeDtypeStruct((pos_BT.shape[0], C), jnp.int32)
        y = jax.eval_shape(turn, shared, state, xs, pos_BT, token_BC)[1]
        return jax.tree.map(lambda y: jnp.zeros((*pos_BT.shape, *y.shape[2:]), y.dtype), y)

    def advance(shared: Any, xs: Any, pos_BT: Array, chunks: Chunks, i: Array, carry: tuple[Any, Any]):
        token_BC = tokens_of(chunks, i, C)
        state, new = turn(shared, carry[0], xs, pos_BT, token_BC)
        return state, jax.tree.map(lambda y, new: write(y, token_BC, new), carry[1], new)

    @jax.custom_vjp
    def run(shared: Any, state: Any, xs: Any, pos_BT: Array, chunks: Chunks) -> tuple[Any, Any]:
        step = functools.partial(advance, shared, xs, pos_BT, chunks)
        with jax.named_scope(f"usually_{usual}"):  # for training.flops: the trips of this loop
            state, y = jax.lax.fori_loop(0, chunks.number, step, (state, empty(shared, state, xs, pos_BT, chunks)))
        return y, state

    def forward(shared: Any, state: Any, xs: Any, pos_BT: Array, chunks: Chunks) -> Any:
        number, every = chunks.number, _every(chunks, slots)
        step = functools.partial(advance, shared, xs, pos_BT, chunks)

        def group(j: Array, carry: tuple[Any, tuple[Any, Any]]):
            kept, now = carry
            kept = _put(kept, j, now[0])
            return kept, jax.lax.fori_loop(j * every, jnp.minimum((j + 1) * every, number), step, now)

        now = state, empty(shared, state, xs, pos_BT, chunks)
        kept, (end, y) = jax.lax.fori_loop(0, -(-number // every), group, (_room(state, slots), now))
        return (y, end), (shared, kept, xs, pos_BT, chunks)

    def backward(saved: Any, slopes: tuple[Any, Any]) -> Any:
        shared, kept, xs, pos_BT, chunks = saved
        dy, dstate = slopes
        number, every = chunks.number, _every(chunks, slots)
        blocks = -(-number // block)

        def one(n: Array, carry: Any):
            """The block that is n-th from the end."""
            states, sums = carry
            first = (blocks - 1 - n) * block
            last = jnp.minimum(first + block, number) - 1

            def again(i: Array, carry: tuple[Any, Any]):
                state, states = carry
                states = _put(states, jnp.maximum(i - first, 0), state)
                return turn(shared, state, xs, pos_BT, tokens_of(chunks, i, C))[0], states

            nearest = first // every
            state, states = jax.lax.fori_loop(nearest * every, last, again, (_get(kept, nearest), states))
            states = _put(states, last - first, state)

            def back(m: Array, sums: Any):
                dshared, dstate, dxs = sums
                i = last - m
                token_BC = tokens_of(chunks, i, C)
                x = jax.tree.map(lambda x: read(x, token_BC), xs)
                dnew = jax.tree.map(lambda dy: read(dy, token_BC), dy)
                local = lambda shared, state, x: body(shared, state, x, read(pos_BT, token_BC, -1))  # noqa: E731
                _, pull = jax.vjp(local, shared, _get(states, i - first), x)
                ds, dstate, dx = pull((dstate, dnew))
                dxs = jax.tree.map(lambda dxs, dx: write(dxs, token_BC, dx), dxs, dx)
                return jax.tree.map(jnp.add, dshared, ds), dstate, dxs

            return states, jax.lax.fori_loop(0, last - first + 1, back, sums)

        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        sums = zeros(shared), dstate, zeros(xs)
        dshared, dstate, dxs = jax.lax.fori_loop(0, blocks, one, (_room(dstate, block), sums))[1]
        return dshared, dstate, dxs, None, None

    run.defvjp(forward, backward)
    return run


def _every(chunks: Chunks, slots: int) -> Array:
    """Of so many states one is kept."""
    return jnp.maximum(-(-chunks.number // slots), 1)


def _room(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), tree)


def _put(room: Any, i: Array, tree: Any) -> Any:
    return jax.tree.map(lambda room, a: jax.lax.dynamic_update_index_in_dim(room, a, i, 0), room, tree)


def _get(room: Any, i: Array) -> Any:
    return jax.tree.map(lambda room: jax.lax.dynamic_index_in_dim(room, i, 0, keepdims=False), room)
