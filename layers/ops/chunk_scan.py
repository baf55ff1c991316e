"""A scan over chunks of C tokens that reads and writes arrays [B, T, ...] where they lie.

`jax.lax.scan` wants its inputs and gives its outputs chunks first, which on a CPU costs a copy of each whole sequence,
forward and backward: a quarter of linear attention's time. Here each turn slices its chunk out of the sequence, and
writes what it makes into another. Differentiated as it stands, that would add a sequence of zeros for each chunk; so
the backward pass is written out: last chunk first, each recomputed from the state it began with and pulled back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Body = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def scan_chunks(
    body: Body, shared: Any, state: Any, xs: Any, marks: Any, C: int, group: int = 1, *, whole: bool = False
) -> tuple[Any, Any]:
    """(the state after the last chunk, y [B, T, ...]).

    body(shared, state, x [B, C, ...], marks [B, C, ...]) -> (state, y [B, C, ...]), trees of arrays; it closes over no
    array. shared, state, xs: floating-point, all of which have gradients; marks: integers or booleans, [B, T, ...].
    C · group divides T. The backward pass starts from the state before every `group`-th chunk. whole: it then takes the
    group as one chunk, which the body must be able to, rather than one after the other.
    Memory of it: inputs, outputs, T / (C group) states, and what one chunk needs.
    """
    T = jax.tree.leaves(xs)[0].shape[1]
    N = T // C
    if N == 1:
        return jax.checkpoint(body)(shared, state, xs, marks)
    body = jax.jit(body, inline=True)  # traced once for all the loops below

    def part(sequences: Any, i: Array, chunks: int = 1) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * C, chunks * C, 1), sequences)

    def write(sequences: Any, i: Array, new: Any) -> Any:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, i * C, 1), sequences, new)

    def keep(room: Any, j: Array, state: Any) -> Any:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, j, 0), room, state)

    def kept(room: Any, j: Array) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, j, 0, keepdims=False), room)

    def empty(n: int, state: Any) -> Any:
        return jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), state)

    def empty_y(shared: Any, state: Any, xs: Any, marks: Any) -> Any:
        chunk = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0], C, *a.shape[2:]), a.dtype), (xs, marks))
        y = jax.eval_shape(body, shared, state, *chunk)[1]
        return jax.tree.map(lambda a: jnp.zeros((a.shape[0], T, *a.shape[2:]), a.dtype), y)

    def times(n: int, turn: Callable[[Array, Any], Any], carry: Any) -> Any:
        return turn(jnp.int32(0), carry) if n == 1 else jax.lax.fori_loop(0, n, turn, carry)

    def advance(shared: Any, xs: Any, marks: Any) -> Callable[[Array, Any], Any]:
        def turn(i: Array, carry: Any) -> Any:
            state, y = carry
            state, new = body(shared, state, part(xs, i), part(marks, i))
            return state, write(y, i, new)

        return turn

    @jax.custom_vjp
    def run(shared: Any, state: Any, xs: Any, marks: Any) -> tuple[Any, Any]:
        return times(N, advance(shared, xs, marks), (state, empty_y(shared, state, xs, marks)))

    def forward(shared: Any, state: Any, xs: Any, marks: Any) -> Any:
        turn = advance(shared, xs, marks)

        def several(j: Array, carry: Any) -> Any:
            room, now = carry
            room = keep(room, j, now[0])
            return room, times(group, lambda n, now: turn(j * group + n, now), now)

        start = empty(N // group, state), (state, empty_y(shared, state, xs, marks))
        room, (state, y) = times(N // group, several, start)
        return (state, y), (shared, room, xs, marks)

    def backward(saved: Any, slopes: tuple[Any, Any]) -> Any:
        shared, room, xs, marks = saved
        dstate, dy = slopes

        def pulled(before: Any, i: Array, chunks: int, carry: Any) -> Any:
            dshared, dstate, dxs = carry
            mark = part(marks, i, chunks)
            _, pull = jax.vjp(lambda *a: body(*a, mark), shared, before, part(xs, i, chunks))
            more, dstate, dx = pull((dstate, part(dy, i, chunks)))
            return jax.tree.map(jnp.add, dshared, more), dstate, write(dxs, i, dx)

        def several(back: Array, carry: Any) -> Any:
            j = N // group - 1 - back
            before = kept(room, j)
            if group == 1 or whole:
                return pulled(before, j * group, group, carry)

            def again(n: Array, carry: Any) -> Any:
                state, states = carry
                i = j * group + n
                return body(shared, state, part(xs, i), part(marks, i))[0], keep(states, n, state)

            last, states = times(group - 1, again, (before, empty(group, before)))
            states = keep(states, jnp.int32(group - 1), last)

            def turn(back: Array, carry: Any) -> Any:
                n = group - 1 - back
                return pulled(kept(states, n), j * group + n, 1, carry)

            return times(group, turn, carry)

        start = jax.tree.map(jnp.zeros_like, shared), dstate, jax.tree.map(jnp.zeros_like, xs)
        return *times(N // group, several, start), None

    run.defvjp(forward, backward)
    return run(shared, state, xs, marks)
