"""Tables that are looked up: rows [...] of a table [W, K] -> [..., K].

A layer says `lookup(self.table[...], rows)`, or `weighted_sum`, and no more. What stands in `self.table` is the array;
or, in a training step that must not handle anything as large as the table, a `Table` that the step lends in its place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.compute_on import compute_on
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from layers.ops.place import BATCH, placed


class Spread(NamedTuple):
    """Rows of a table in equal parts over `axes` of a mesh, the first axis outermost.

    host: the table lies whole in the host's memory, of a mesh of one device.
    """

    mesh: Mesh
    axes: tuple[str, ...]
    host: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    def divides(self, rows: Array) -> bool:
        """Whether the batch of a look-up can be split as the mesh says."""
        return rows.shape[0] % math.prod(self.sizes.get(axis, 1) for axis in BATCH) == 0


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("array", "repeat", "slots_NK"), meta_fields=("spread",)
)
@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it is lent to a layer for a look-up.

    array: [W, K]; or [L, W, K], those of all repeats of a stage, of which `repeat` (an int32 scalar) is the layer's.
        None where `set_aside` took it out.
    slots_NK: zeros, one for each row of the look-up, that are added to what is fetched. They are what is
        differentiated: the table is not, so that no gradient has its size.
    spread: where its rows lie, if the look-up itself is to see to it that they stay there. Where rows and batch are
        split over one axis, XLA's partitioner may gather the table, and the gradient's sum too.
    """

    array: Array | None
    repeat: Array | None = None
    slots_NK: Array | None = None
    spread: Spread | None = None

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
    spread, rows = table.spread, jnp.clip(rows, 0, array.shape[-2] - 1)
    if spread is not None and spread.host:
        repeat = None if table.repeat is None else jnp.broadcast_to(table.repeat, rows.shape)
        found = to_device(on_host(_fetch)(array, repeat, rows))
    elif spread is None or not spread.divides(rows):
        found = _fetch(array, table.repeat, rows)
    else:
        found = _on_shards(_fetch_own, array, table.repeat, rows, spread=spread)
    if table.slots_NK is None:
        return found
    return found + table.slots_NK[: rows.size].reshape(found.shape)


def weighted_sum(table: Array | Table, rows: Array, weights: Array) -> Array:
    """sum over the last axis of rows, int32 [..., R], of weight · row: [..., K] in the dtype of the weights.

    The backward pass fetches the rows again: what is kept does not grow with K. Devices that share a table's rows send
    sums, and not the rows; but with slots, which are differentiated row by row, all are fetched.
    """
    if not isinstance(table, Table):
        return _weighted(table, rows, weights)
    spread, array = table.spread, table.array
    if table.slots_NK is None and array is not None and spread is not None and spread.axes and spread.divides(rows):
        return _on_shards(_weigh_own, array, table.repeat, rows, weights, spread=spread)
    return jnp.sum(weights[..., None] * lookup(table, rows).astype(weights.dtype), -2)


@jax.checkpoint
def _weighted(array: Array, rows: Array, weights: Array) -> Array:
    return jnp.sum(weights[..., None] * _fetch(array, None, rows).astype(weights.dtype), -2)


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Computed by the host: the first argument lies in its memory, the others are sent there; what comes out stays."""
    computed = compute_on("device_host")(jax.jit(function))
    return lambda lies, *sent: computed(lies, *jax.device_put(sent, jax.memory.Space.Host))


def to_device(x: Array) -> Array:
    return jax.device_put(x, jax.memory.Space.Device)


def _fetch(array: Array, repeat: Array | None, rows: Array) -> Array:
    at = (rows,) if repeat is None else (repeat, rows)
    return array.at[at].get(mode="clip")


def _fetch_own(part: Array, repeat: Array | None, at: Array, mine: Array) -> Array:
    return jnp.where(mine[..., None], _fetch(part, repeat, at), 0)


def _weigh_own(part: Array, repeat: Array | None, at: Array, mine: Array, weights: Array) -> Array:
    part = part if repeat is None else part[repeat]
    return _weighted(part, at, jnp.where(mine, weights, 0))


def _on_shards(
    answer: Callable[..., Array], array: Array, repeat: Array | None, rows: Array, *others: Array, spread: Spread
) -> Array:
    """Each device hears all of the batch's rows (and `others`), answers for its own with zeros for the rest, and gets
    back the sums of its part of the batch: row numbers and answers travel, the table does not, nor does its gradient.

    answer(part, repeat, row of the part, whether that row is meant, *others) -> [batch, ..., K].
    """
    axes = spread.axes
    batch = placed("BT", rows.shape[:2], spread.sizes)
    both = tuple(axis for axis in axes if axis in BATCH)  # over which both the table and the batch are split

    def local(part: Array, repeat: Array | None, rows: Array, *others: Array) -> Array:
        if both:
            rows, *others = (jax.lax.all_gather(a, both, tiled=True) for a in (rows, *others))  # type: ignore[assignment]
        size = part.shape[-2]
        at = rows - jax.lax.axis_index(axes) * size
        mine = (at >= 0) & (at < size)
        found = answer(part, repeat, jnp.where(mine, at, 0), mine, *others)
        rest = tuple(axis for axis in axes if axis not in both)
        found = jax.lax.psum(found, rest) if rest else found
        return jax.lax.psum_scatter(found, both, tiled=True) if both else found

    whole = (None,) * (array.ndim - 2)
    specs = (P(*whole, axes, None), None if repeat is None else P(), *(batch for _ in (rows, *others)))
    lookup = jax.shard_map(local, mesh=spread.mesh, in_specs=specs, out_specs=batch)
    return lookup(array, repeat, rows, *others)


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
