"""Tables trained row by row: a step costs what its batch looks up, whatever the table's size.

The table is no argument of the gradient. What a look-up fetches has zeros added (`layers.ops.tables.Table`); their
gradient is that of the rows, one for each place of the look-up, and the layers say which rows those were (aux
"rows/..."). Rows asked for more than once have their gradients summed, and Adam's moments and the rows themselves are
read and written at those places alone, in the buffers that the step was given.

For each row r of a batch, with n its own count of such batches, and the learning rate of the run's step:

    n_r = n_r + 1 ;  m_r = b1 m_r + (1 - b1) g_r ;  v_r = b2 v_r + (1 - b2) g_r²
    r = r - lr (m_r / (1 - b1^n_r) / (sqrt(v_r / (1 - b2^n_r)) + eps))

A row that is in every batch has the usual Adam, to the rounding. One that rests keeps its values and moments, bit for
bit. Counting by row, and not by step as other sparse Adams do, is ours: so a row that is asked for late, or seldom,
begins with steps of the learning rate's size rather than ones that the zeros in its moments decide.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from layers.ops.tables import Spread, Table, on_host
from models.parameters import Params, Spec


class Read(NamedTuple):
    """Of one table: keys_N int32, each row once, `repeat · W + row`; L · W for none, at the end. slopes_NK."""

    keys_N: Array
    slopes_NK: Array


@dataclasses.dataclass(frozen=True)
class LazyAdam:
    """specs: of the tables. rate: step -> learning rate. clip: largest norm of all tables' gradients together."""

    specs: dict[str, Spec]
    rate: optax.Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: Any  # a float, or traced
    clip: float | None

    def __post_init__(self):
        for name, spec in self.specs.items():
            if math.prod(spec.shape[:-1]) >= 2**31 - 1:
                raise ValueError(
                    f"optimizer.lazy_tables: {name} has {math.prod(spec.shape[:-1])} rows, and they are numbered in "
                    "32 bits: use fewer, or more tables"
                )

    def apart(self, params: Params) -> tuple[Params, Params]:
        """(the tables, all other parameters)"""
        rest = {name: p for name, p in params.items() if name not in self.specs}
        return {name: params[name] for name in self.specs}, rest

    def init(self, tables: Params) -> dict[str, Any]:
        """Moments, batches that asked for each row, and steps taken."""
        return {
            "mu": jax.tree.map(jnp.zeros_like, tables),
            "nu": jax.tree.map(jnp.zeros_like, tables),
            "times": {name: jnp.zeros(table.shape[:-1], jnp.int32) for name, table in tables.items()},
            "count": jnp.zeros([], jnp.int32),
        }

    def slots(self, rows: dict[str, list[Any]]) -> Params:
        """Zeros for what is looked up. rows: by table and repeat, of which only the shapes are read."""
        missing = [name for name in self.specs if name not in rows]
        if missing:
            place, _, name = missing[0].rpartition(".")
            raise ValueError(
                f'optimizer.lazy_tables: {place} does not say which rows it reads: give its aux "rows/{name}" '
                "(layers/layer.py), or set optimizer.lazy_tables to False"
            )
        for name, spec in self.specs.items():
            if len(spec.shape) == 2 and len(rows[name]) > 1:
                raise ValueError(
                    f"optimizer.lazy_tables: {name} is shared by {len(rows[name])} layers, and a row has one: "
                    "let each have its own (shared=False), or set optimizer.lazy_tables to False"
                )
        return {
            name: jnp.zeros([*spec.shape[:-2], max(math.prod(r.shape) for r in rows[name]), spec.shape[-1]])
            for name, spec in self.specs.items()
        }

    def lend(self, tables: Params, slots: Params | None = None) -> dict[str, Table]:
        """What stands in the tables' places in a model."""
        return {
            name: Table(
                table,
                jnp.arange(table.shape[0], dtype=jnp.int32) if table.ndim == 3 else None,
                None if slots is None else slots[name],
            )
            for name, table in tables.items()
        }

    def keys(self, rows: dict[str, list[Array]]) -> dict[str, Array]:
        """Rows as they were said -> int32 [L, N] or [N], numbered as in `Read` but in the order of the slots."""
        found = {}
        for name, spec in self.specs.items():
            W, most = spec.shape[-2], max(r.size for r in rows[name])
            none = math.prod(spec.shape[:-1])
            flat = [jnp.pad(r.reshape(-1), (0, most - r.size), constant_values=-1) for r in rows[name]]
            keys = [jnp.where(r < 0, none, jnp.minimum(r, W - 1) + i * W) for i, r in enumerate(flat)]
            found[name] = jnp.stack(keys) if len(spec.shape) == 3 else keys[0]
        return found

    def read(self, keys: dict[str, Array], slopes: Params) -> dict[str, Read]:
        """Each row once, with the sum of its gradients. keys: [..., N]; slopes: [..., N, K]."""
        return {
            name: _sum(keys[name].reshape(-1), slopes[name].reshape(-1, spec.shape[-1]), math.prod(spec.shape[:-1]))
            for name, spec in self.specs.items()
        }

    def update(
        self, reads: dict[str, Read], state: Any, tables: Params, good: Array, spread: Mapping[str, Spread]
    ) -> tuple[Params, Any]:
        """(tables, state) after a step; as they were where it is not `good`. spread: where rows lie, of some tables."""
        slopes = {name: read.slopes_NK for name, read in reads.items()}
        if self.clip is not None:
            slopes, _ = optax.clip_by_global_norm(self.clip).update(slopes, optax.EmptyState())
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its step counts with floats
            lr = jnp.asarray(self.rate(state["count"]), jnp.float32)
        new: dict[str, Any] = {"mu": {}, "nu": {}, "times": {}, "count": state["count"] + good.astype(jnp.int32)}
        after = {}
        for name, spec in self.specs.items():
            # Of a step that is not good, all rows are beyond the table: nothing is written.
            keys = jnp.where(good, reads[name].keys_N, math.prod(spec.shape[:-1]))
            stored = _Stored(tables[name], *(state[kind][name] for kind in ("mu", "nu", "times")))
            move: Move = functools.partial(self._move, decay=self.weight_decay if spec.decay else 0.0)
            if name in spread:
                move = on_host(move) if spread[name].host else _each_device(move, spread[name], stored)
            # Of a table without repeats a key is its row, and that of none is beyond it.
            repeat, row = (keys // spec.shape[-2], keys % spec.shape[-2]) if len(spec.shape) == 3 else (keys, keys)
            written = move(stored, repeat, row, slopes[name], lr)
            after[name] = written.table
            for kind in ("mu", "nu", "times"):
                new[kind][name] = getattr(written, kind)
        return after, new

    def _move(self, s: "_Stored", repeat_N: Array, row_N: Array, g_NK: Array, lr: Array, decay: float) -> "_Stored":
        """repeat_N (of a table that has them), row_N: what to write, in order; what lies beyond the table is not."""
        at = (repeat_N, row_N) if s.table.ndim == 3 else (row_N,)
        row, mu, nu, times = (a.at[at].get(mode="clip") for a in s)
        times = times + 1
        mu, nu = self.b1 * mu + (1 - self.b1) * g_NK, self.b2 * nu + (1 - self.b2) * g_NK * g_NK
        n_N1 = times.astype(jnp.float32)[:, None]
        step = mu / (1 - self.b1**n_N1) / (jnp.sqrt(nu / (1 - self.b2**n_N1)) + self.eps) + decay * row
        return _Stored(*(_write(a, at, value) for a, value in zip(s, (row - lr * step, mu, nu, times), strict=True)))


class _Stored(NamedTuple):
    """Of one table, [L, W, ...] or [W, ...]."""

    table: Array
    mu: Array
    nu: Array
    times: Array


Move = Callable[[_Stored, Array, Array, Array, Array], _Stored]


def _each_device(move: Move, spread: Spread, stored: _Stored) -> Move:
    """`move` where the rows of a table lie apart: each device writes its own."""

    def local(part: _Stored, repeat_N: Array, row_N: Array, g_NK: Array, lr: Array) -> _Stored:
        size = part.table.shape[-2]
        row_N = row_N - jax.lax.axis_index(spread.axes) * size
        return move(part, repeat_N, jnp.where((row_N >= 0) & (row_N < size), row_N, size), g_NK, lr)

    whole = (None,) * (stored.table.ndim - 2)
    lies: Any = jax.tree.map(lambda a: P(*whole, spread.axes, *(None,) * (a.ndim - len(whole) - 1)), stored)
    return jax.shard_map(local, mesh=spread.mesh, in_specs=(lies, P(), P(), P(), P()), out_specs=lies)


def _write(array: Array, at: tuple[Array, ...], value: Array) -> Array:
    return array.at[at].set(value, mode="drop")


def _sum(keys_N: Array, slopes_NK: Array, none: int) -> Read:
    order = jnp.argsort(keys_N)
    keys_N, slopes_NK = keys_N[order], slopes_NK[order]
    first = jnp.concatenate([jnp.ones([1], bool), keys_N[1:] != keys_N[:-1]])
    place = jnp.cumsum(first, dtype=jnp.int32) - 1
    summed = jax.ops.segment_sum(slopes_NK, place, keys_N.size, indices_are_sorted=True)
    keys = jnp.full_like(keys_N, none).at[place].set(keys_N, indices_are_sorted=True)
    return Read(keys, jnp.where((keys < none)[:, None], summed, 0))
