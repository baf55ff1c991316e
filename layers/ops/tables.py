"""Tables that are looked up: rows [...] of a table [W, K] -> [..., K].

A layer says `lookup(self.table[...], rows)` and no more. What stands in `self.table` is the array; or, in a training
step that must not handle anything as large as the table, a `Table` that the step lends in its place.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("array", "repeat", "slots_NK"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is lent to a layer for a look-up.

    array: [W, K]; or [L, W, K], those of all repeats of a stage, of which `repeat` (an int32 scalar) is the layer's.
        None where `set_aside` took it out.
    slots_NK: zeros, one for each row of the look-up, that are added to what is fetched. They are what is
        differentiated: the table is not, so that no gradient has its size.
    """

    array: Array | None
    repeat: Array | None = None
    slots_NK: Array | None = None

    def __getitem__(self, index: Any) -> "Table":
        """`table[...]`, as of a Param with an array."""
        if index is not ...:
            raise TypeError("a table that is lent is read by layers.ops.tables.lookup alone")
        return self


def lookup(table: Array | Table, rows: Array) -> Array:
    """Rows of a table, in its dtype. rows: int32 [...], held within the table. Returns [..., K].

    A `Table` with slots answers one look-up a call of the layer: a layer that asks twice asks for both at once.
    """
    if not isinstance(table, Table):
        return jnp.take(table, rows, axis=0, mode="clip")
    array = table.array
    if array is None:
        raise ValueError("a table was looked up while it was set aside")
    if table.slots_NK is not None:
        array = jax.lax.stop_gradient(array)
    at = (rows,) if table.repeat is None else (table.repeat, rows)
    found = array.at[at].get(mode="clip")
    if table.slots_NK is None:
        return found
    return found + table.slots_NK[: rows.size].reshape(found.shape)


def asked(rows: Array, pos_BT: Array) -> Array:
    """What a layer says of its look-up, as aux "rows/NAME of the Param": rows [B, T, ...], but -1 at padding, which
    touches nothing."""
    pos = pos_BT.reshape(pos_BT.shape + (1,) * (rows.ndim - pos_BT.ndim))
    return jnp.where(pos >= 0, rows, -1)


def _is_table(x: Any) -> bool:
    return isinstance(x, Table)


def set_aside(stacked: Any) -> tuple[list[Array | None], Any]:
    """(the arrays of lent tables that hold all repeats, the rest): the rest may be cut or scanned, those lie still."""
    leaves, treedef = jax.tree.flatten(stacked, is_leaf=_is_table)
    arrays = [leaf.array if _is_table(leaf) and leaf.repeat is not None else None for leaf in leaves]
    if not any(a is not None for a in arrays):
        return [], stacked
    rest = [x if a is None else dataclasses.replace(x, array=None) for x, a in zip(leaves, arrays, strict=True)]
    return arrays, jax.tree.unflatten(treedef, rest)


def put_back(arrays: list[Array | None], block: Any) -> Any:
    """One repeat of `set_aside`'s rest, with the arrays of all."""
    if not arrays:
        return block
    leaves, treedef = jax.tree.flatten(block, is_leaf=_is_table)
    whole = [x if a is None else dataclasses.replace(x, array=a) for x, a in zip(leaves, arrays, strict=True)]
    return jax.tree.unflatten(treedef, whole)
