"""Where the n-grams of a config lie in its table: for what looks up rows by the last few ids and by nothing else.

A config of these has W, N, H, rows, pad, seed, canonical, multipliers, layer and layers, as Engram describes them.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.layer import Tokens, positive
from layers.ops import ngram
from layers.ops.chunk_loop import write

EVEN = 128  # rows of the table are a multiple of it, so that devices can share them


class Hashes(NamedTuple):
    """canonical: int32 [W], or None for the ids themselves. pad: the canonical one."""

    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    canonical: np.ndarray | None
    pad: int

    @property
    def pairs(self) -> tuple[int, ...]:
        return tuple(p for order in self.primes for p in order)

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return -(-sum(self.pairs) // EVEN) * EVEN


def check(config: Any) -> None:
    """Raises ValueError, naming the field. For `__post_init__`."""
    c, name = config, type(config).__name__
    positive(c, "W", "H", "K")
    if c.N < 2:
        raise ValueError(f"{name}.N is {c.N}: the shortest n-gram has 2 tokens, so it must be at least 2")
    if c.W > ngram.MOST_WORDS:
        raise ValueError(f"{name}.W is {c.W}: hashes are exact up to {ngram.MOST_WORDS} words")
    if not 0 <= c.pad < c.W:
        raise ValueError(f"{name}.pad is {c.pad}: it must be an id below W = {c.W}")
    rows = _rows(c)
    if len(rows) != c.N - 1 or min(rows) < 2 or max(rows) > ngram.MOST_ROWS // 2:
        raise ValueError(
            f"{name}.rows is {c.rows}: give one number, or {c.N - 1} for N = {c.N}, "
            f"each from 2 to {ngram.MOST_ROWS // 2}"
        )
    if c.multipliers is not None and len(c.multipliers) != c.N:
        raise ValueError(f"{name}.multipliers are {len(c.multipliers)}: they must be N = {c.N}")


def _rows(config: Any) -> tuple[int, ...]:
    return (config.rows,) * (config.N - 1) if isinstance(config.rows, int) else config.rows


@functools.lru_cache(maxsize=64)
def hashes(config: Any) -> Hashes:
    c, table, words = config, None, config.W
    if c.canonical is not None:
        name = f"{type(c).__name__}.canonical"
        try:
            table = np.load(Path(c.canonical).expanduser(), allow_pickle=False).astype(np.int32)
        except (OSError, ValueError) as why:
            raise ValueError(f"{name} is {c.canonical!r}: cannot be read as an array ({why})") from None
        if table.shape != (c.W,) or table.min() < 0:
            raise ValueError(f"{name} is {c.canonical!r}: {table.shape} ids, not one for each of W = {c.W}")
        words = int(table.max()) + 1
    drawn = c.multipliers or ngram.multipliers(c.seed, c.layer, c.N, words)
    pad = c.pad if table is None else int(table[c.pad])
    return Hashes(drawn, ngram.primes(_rows(c), c.H, c.layers)[c.layer], table, pad)


def constants(known: Hashes) -> dict[str, Any]:
    """For `LayerConfig.constants`."""
    sha = None if known.canonical is None else hashlib.sha256(known.canonical.tobytes()).hexdigest()
    return {"multipliers": list(known.multipliers), "primes": [list(p) for p in known.primes], "canonical": sha}


def addresses(config: Any, tokens: Tokens, before_BN: Array | None = None) -> tuple[Array, Array]:
    """(rows of the table [B, T, R] int32, the last N - 1 canonical ids); nothing but ids and places is read.

    before_BN: canonical ids of the tokens before.
    """
    c, known, pos = config, hashes(config), tokens.pos_BT
    ids = jnp.clip(tokens.ids_BT, 0, c.W - 1)
    if known.canonical is not None:
        ids = jnp.take(jnp.asarray(known.canonical), ids)
    if before_BN is None:
        before_BN = jnp.full((ids.shape[0], c.N - 1), known.pad, jnp.int32)
    # Without the padding that may lie between them, behind what came before.
    valid = pos >= 0
    rank_BT = jnp.cumsum(valid, 1, dtype=jnp.int32) - 1
    seen = jnp.concatenate([before_BN, jnp.zeros_like(ids)], 1)
    seen = write(seen, jnp.where(valid, rank_BT + c.N - 1, seen.shape[1]), ids)
    back = [jnp.take_along_axis(seen, jnp.maximum(rank_BT, 0) + c.N - 1 - i, 1) for i in range(c.N)]
    ids_NBT = jnp.stack([jnp.where(pos >= i, a, known.pad) for i, a in enumerate(back)])
    first = np.cumsum([0, *known.pairs[:-1]]).astype(np.int32)
    rows_BTR = ngram.rows(ids_NBT, known.multipliers, known.primes) + jnp.asarray(first)[None, None]
    last = rank_BT[:, -1:] + 1 + jnp.arange(c.N - 1, dtype=jnp.int32)[None]
    return rows_BTR, jnp.take_along_axis(seen, last, 1)
