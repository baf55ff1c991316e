"""Time over devices: each reads its piece of the tokens, and tells the others what that piece does to a memory.

What a piece does to a state it was handed is small, whatever the number of its tokens: for a recurrence that is linear
in its state S -> A S + B. All devices hear that of all pieces and work out the state that enters their own; then each
reads its tokens once more, from there. Tokens themselves are never sent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from layers.ops.place import SEQUENCE, placed, sizes


def in_pieces(T: int) -> bool:
    """Whether what is traced has T tokens in equal pieces over devices."""
    count = sizes().get(SEQUENCE, 1)
    return count > 1 and T % count == 0


def by_pieces(function: Callable[..., Any], arguments: Mapping[str, tuple[str, Array | None]], results: Any) -> Any:
    """function(**arguments) on each device, of its own parts; arguments that are None are left out.

    arguments: by name, letters of the first axes and the array. results: letters of each array that is returned, and
    its shape.
    """
    given = {name: (letters, array) for name, (letters, array) in arguments.items() if array is not None}
    specs = {name: placed(letters, array.shape, sizes()) for name, (letters, array) in given.items()}
    out = tuple(placed(letters, shape, sizes()) for letters, shape in results)
    run = jax.shard_map(lambda parts: function(**parts), in_specs=(specs,), out_specs=out, check_vma=False)
    return run({name: array for name, (_, array) in given.items()})


def hand_on(does: Any, then: Callable[[Any, Any], Any], start: Any) -> tuple[Any, Any]:
    """(the state that enters this device's piece, the state after all pieces).

    does: what this piece does to a state; then(does, state) is the state after it. Within `by_pieces`.
    """
    everyones = jax.lax.all_gather(does, SEQUENCE)
    here, state, enters = jax.lax.axis_index(SEQUENCE), start, start
    for piece in range(jax.lax.axis_size(SEQUENCE)):
        enters = jax.tree.map(lambda new, old, piece=piece: jnp.where(here == piece, new, old), state, enters)
        state = then(jax.tree.map(lambda x, piece=piece: x[piece], everyones), state)
    return enters, state
