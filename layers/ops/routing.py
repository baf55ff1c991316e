"""Tokens that go to some of M memories, laid out so that each memory reads its own in order.

A token and one of the `top` memories it goes to make a pair. A row of T tokens becomes a stream of T · top slots: the
pairs of memory 0 in order of time, then those of memory 1, and so on; padding goes nowhere and leaves slots empty at
the end. All sizes are known; where one memory's part ends and the next begins is data. A token's place in its part
counts the tokens of its document that came to the same memory before it, so that a part begins as a document does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.chunk_loop import read, write

BLOCK = 64  # slots that one turn of `by_memory` maps, in each row


class Places(NamedTuple):
    """place_BTM: of a token in each memory, -1 where it does not go there. count_BM: of the document at the end."""

    place_BTM: Array
    count_BM: Array


class Stream(NamedTuple):
    """pair_BS: t · top + i of a slot's token; T · top for none. slot_BTk: where a pair lies; T · top for nowhere.

    pos_BS: as in layers.layer.Tokens. first_BM, number_BM: of the slots of each memory.
    """

    pair_BS: Array
    slot_BTk: Array
    pos_BS: Array
    first_BM: Array
    number_BM: Array


def largest(score: Array, top: int, among: Array | None = None) -> list[Array]:
    """The `top` largest over the last axis, one after the other; of equals the first.

    Each is bool [..., M], true at one place, or nowhere where `among` (bool, which may be chosen; None: all) leaves too
    few. One maximum after the other: lax.top_k sorts, and a mesh would gather all rows to do so.
    """
    rest = jax.lax.stop_gradient(score)
    rest = rest if among is None else jnp.where(among, rest, -jnp.inf)
    place = jnp.arange(score.shape[-1], dtype=jnp.int32).reshape((1,) * (score.ndim - 1) + (-1,))
    chosen = []
    for _ in range(top):
        first = jnp.argmax(rest, -1, keepdims=True).astype(jnp.int32)
        one = (place == first) & (rest > -jnp.inf)
        rest = jnp.where(one, -jnp.inf, rest)
        chosen.append(one)
    return chosen


def places(routed_BTkM: Array, pos_BT: Array, count_BM: Array) -> Places:
    """routed_BTkM: which memory a pair goes to, int32, 1 there. count_BM: of the document that goes on."""
    routed_BTM = jnp.sum(routed_BTkM, 2, dtype=jnp.int32)
    upto_BTM = jnp.cumsum(routed_BTM, 1, dtype=jnp.int32)
    start_BT1 = (pos_BT == 0)[..., None]
    # What had come before the last start: running sums grow, so that the last one is the largest.
    before_BTM = jax.lax.cummax(jnp.where(start_BT1, upto_BTM - routed_BTM, 0), axis=1)
    goes_on_BT1 = jax.lax.cummax(start_BT1.astype(jnp.int32), axis=1) == 0
    held_BTM = upto_BTM - before_BTM + jnp.where(goes_on_BT1, count_BM[:, None], 0)
    return Places(jnp.where(routed_BTM > 0, held_BTM - 1, -1), held_BTM[:, -1])


def stream(routed_BTkM: Array, place_BTM: Array) -> Stream:
    B, T, k, _ = routed_BTkM.shape
    upto_BTM = jnp.cumsum(jnp.sum(routed_BTkM, 2, dtype=jnp.int32), 1, dtype=jnp.int32)
    number_BM = upto_BTM[:, -1]
    first_BM = jnp.cumsum(number_BM, 1, dtype=jnp.int32) - number_BM

    def of_pair(a_BTM: Array) -> Array:  # a sum over few, which a mesh leaves alone, and not a look-up
        return jnp.sum(routed_BTkM * a_BTM[:, :, None], 3, dtype=jnp.int32)

    slot_BTk = of_pair(first_BM[:, None] + upto_BTM) - 1
    slot_BTk = jnp.where(slot_BTk < 0, T * k, slot_BTk)
    pair = jnp.arange(T * k, dtype=jnp.int32)
    empty = jnp.full((B, T * k), T * k, jnp.int32)
    pair_BS = write(empty, slot_BTk.reshape(B, -1), jnp.broadcast_to(pair, (B, T * k)))
    pos_BS = read(of_pair(place_BTM).reshape(B, -1), pair_BS, -1)
    return Stream(pair_BS, slot_BTk, pos_BS, first_BM, number_BM)


@jax.custom_vjp
def spread(x_BT: Array, stream: Stream) -> Array:
    """What each slot's token holds: [B, T, ...] -> [B, S, ...], zeros in empty slots."""
    return read(x_BT, stream.pair_BS // stream.slot_BTk.shape[-1])


@jax.custom_vjp
def collect(y_BS: Array, stream: Stream) -> Array:
    """What each token's slots hold: [B, S, ...] -> [B, T, top, ...], zeros for padding."""
    slot_BTk = stream.slot_BTk
    return read(y_BS, slot_BTk.reshape(slot_BTk.shape[0], -1)).reshape(*slot_BTk.shape, *y_BS.shape[2:])


# Each is the other's transpose, so that neither scatters.
spread.defvjp(
    lambda x, stream: (spread(x, stream), stream),
    lambda stream, dy: (jnp.sum(collect(dy, stream), 2), None),
)
collect.defvjp(
    lambda y, stream: (collect(y, stream), stream),
    lambda stream, dy: (read(dy.reshape(dy.shape[0], -1, *dy.shape[3:]), stream.pair_BS), None),
)


def by_memory(call: Callable[[Any, Array], Any], each_M: Any, x_BSD: Array, stream: Stream, block: int = BLOCK) -> Any:
    """call(parameters of the slot's memory, x_BCD) for all slots: a tree of [B, S, ...], zeros in empty slots.

    each_M: floating-point arrays with a leading axis M. `call` reads each token by itself and closes over no array.
    The work is that of the slots, not of M times the slots: the memories take turns, each with a loop over its blocks.
    """
    return _by_memory(call, block)(each_M, x_BSD, stream.first_BM, stream.number_BM)


def _by_memory(call: Callable[[Any, Array], Any], block: int) -> Callable[..., Any]:
    def slots(first_B: Array, number_B: Array, i: Array, S: int) -> Array:
        at = i * block + jnp.arange(block, dtype=jnp.int32)[None]
        return jnp.where(at < number_B[:, None], first_B[:, None] + at, S)

    def turns(number_B: Array) -> Array:
        return -(-jnp.max(number_B) // block)

    def usual(number_BM: Array, S: int) -> str:
        return f"usually_{-(-S // (block * number_BM.shape[1]))}"  # for training.flops: the trips of this loop

    @jax.custom_vjp
    def run(each_M: Any, x_BSD: Array, first_BM: Array, number_BM: Array) -> Any:
        S = x_BSD.shape[1]

        def memory(y: Any, part: tuple[Any, Array, Array]) -> tuple[Any, None]:
            each, first_B, number_B = part

            def turn(i: Array, y: Any) -> Any:
                slot_BC = slots(first_B, number_B, i, S)
                new = call(each, read(x_BSD, slot_BC))
                return jax.tree.map(lambda y, new: write(y, slot_BC, new), y, new)

            return jax.lax.fori_loop(0, turns(number_B), turn, y), None

        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), each_M)
        shapes = jax.eval_shape(call, one, x_BSD)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        with jax.named_scope(usual(number_BM, S)):
            return jax.lax.scan(memory, empty, (each_M, first_BM.T, number_BM.T))[0]

    def forward(each_M: Any, x_BSD: Array, first_BM: Array, number_BM: Array) -> tuple[Any, Any]:
        return run(each_M, x_BSD, first_BM, number_BM), (each_M, x_BSD, first_BM, number_BM)

    def backward(saved: Any, dy: Any) -> tuple[Any, Array, None, None]:
        each_M, x_BSD, first_BM, number_BM = saved
        S = x_BSD.shape[1]

        def memory(dx_BSD: Array, part: tuple[Any, Array, Array]) -> tuple[Array, Any]:
            each, first_B, number_B = part

            def turn(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
                dx_BSD, d_each = carry
                slot_BC = slots(first_B, number_B, i, S)
                _, pull = jax.vjp(call, each, read(x_BSD, slot_BC))
                new, dx_BCD = pull(jax.tree.map(lambda a: read(a, slot_BC), dy))
                return write(dx_BSD, slot_BC, dx_BCD), jax.tree.map(jnp.add, d_each, new)

            zeros = jax.tree.map(jnp.zeros_like, each)
            return jax.lax.fori_loop(0, turns(number_B), turn, (dx_BSD, zeros))

        with jax.named_scope(usual(number_BM, S)):
            dx_BSD, d_M = jax.lax.scan(memory, jnp.zeros_like(x_BSD), (each_M, first_BM.T, number_BM.T))
        return d_M, dx_BSD, None, None

    run.defvjp(forward, backward)
    return run
