"""Time over devices: each reads its piece of the tokens, and tells the others what that piece does to a memory.

What a piece does to a state it was handed is small, whatever the number of its tokens: for a recurrence that is linear
in its state S -> A S + B. All devices hear that of all pieces and work out the state that enters their own; then each
reads its tokens once more, from there. Tokens themselves are never sent.

A memory without such a form has to be read in order. A batch's rows know nothing of each other, nor do its heads: so
each device swaps its piece of all rows for the whole of some, or of some heads (DeepSpeed-Ulysses, arXiv 2309.14509,
does that for attention), reads them, and swaps back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from layers.ops.place import BATCH, MODEL, SEQUENCE, place, placed, sizes


def in_pieces(T: int) -> bool:
    """Whether what is traced has T tokens in equal pieces over devices."""
    count = sizes().get(SEQUENCE, 1)
    return count > 1 and T % count == 0


def by_rows(
    function: Callable[..., Any],
    shape: tuple[int, int, int],
    arguments: Mapping[str, tuple[str, Any]],
    results: Sequence[str],
) -> Any:
    """function(**arguments) on each device, of whole rows, and nothing is sent meanwhile, slopes of weights included.

    Where tokens are in pieces, a device has as many rows of a batch, or else heads, less. Where neither divides, it has
    all tokens.

    shape: (B, T, H). arguments: by name, letters of the first axes of all arrays of a tree, and the tree. results: such
    letters of each that is returned.
    """
    (B, T, H), mesh = shape, sizes()

    def over(size: int, *axes: str) -> tuple[str, ...]:
        """These axes, if all of them divide the size."""
        there = tuple(axis for axis in axes if mesh.get(axis, 1) > 1)
        return () if size % math.prod(mesh[axis] for axis in there) else there

    lies = {"B": over(B, *BATCH), "H": over(H, MODEL)}
    if in_pieces(T):
        if more := over(B, *BATCH, SEQUENCE):
            lies["B"] = more
        elif more := over(H, MODEL, SEQUENCE):
            lies["H"] = more

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(lies.get(letter) or None for letter in letters))

    specs = {name: spec(letters) for name, (letters, _) in arguments.items()}
    out = tuple(spec(letters) for letters in results)
    run = jax.shard_map(lambda parts: function(**parts), in_specs=(specs,), out_specs=out, check_vma=False)
    # Said on both sides, or the partitioner may find no way to swap.
    given = {name: _place_all(tree, letters) for name, (letters, tree) in arguments.items()}
    return tuple(_place_all(tree, letters) for tree, letters in zip(run(given), results, strict=True))


def _place_all(tree: Any, letters: str) -> Any:
    return jax.tree.map(lambda x: place(x, letters), tree)


def by_pieces(function: Callable[..., Any], arguments: Mapping[str, tuple[str, Any]], results: Any) -> Any:
    """function(**arguments) on each device, of its own parts; arguments that are None are left out.

    arguments: by name, letters of the first axes of all arrays of a tree, and the tree. results: letters of each array
    that is returned, and its shape.
    """

    def specs_of(letters: str, tree: Any) -> Any:
        return jax.tree.map(lambda array: placed(letters, array.shape, sizes()), tree)

    given = {name: (letters, tree) for name, (letters, tree) in arguments.items() if tree is not None}
    specs = {name: specs_of(letters, tree) for name, (letters, tree) in given.items()}
    out = tuple(placed(letters, shape, sizes()) for letters, shape in results)
    run = jax.shard_map(lambda parts: function(**parts), in_specs=(specs,), out_specs=out, check_vma=False)
    return run({name: tree for name, (_, tree) in given.items()})


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
