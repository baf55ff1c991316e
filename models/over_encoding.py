"""Over-encoding (Huang et al. 2025, arXiv 2501.16975): a word's embedding averaged with those of the n-grams it ends.

    x_t = (embed(id_t) + sum over n = 2 .. N, h = 1 .. H of W_nh row_nh) / (1 + (N - 1) H)

row_nh is what a table holds at a hash of the last n ids (layers/hashes.py): the look-up of Engram, without its gate and
filter, once, where the model begins. It is no layer: it reads nothing of the residual stream.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers import hashes
from layers.layer import Einsum, Out, Tokens, one_of
from layers.ops.tables import asked, lookup


@dataclasses.dataclass(frozen=True)
class OverEncoding:
    """W, N, H, K, rows, pad, seed, canonical, multipliers: as of Engram.

    average: what the sum is divided by. "mean": the number of its parts; "root": the square root of that, which keeps
        the size of a sum of parts that know nothing of each other.

    Rows start as N(0, 1 / ((N - 1) H K)), small beside a word's embedding, and are trained as Engram's are.
    """

    W: int = 257
    N: int = 3
    H: int = 4
    K: int = 16
    rows: int | tuple[int, ...] = 1 << 14
    average: Literal["mean", "root"] = "mean"
    pad: int = 0
    seed: int = 0
    canonical: str | None = None
    multipliers: tuple[int, ...] | None = None

    layer: ClassVar[int] = 0
    layers: ClassVar[tuple[int, ...]] = (0,)

    def __post_init__(self):
        one_of(self)
        hashes.check(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "OverEncoder":
        return OverEncoder(self, D, rngs=rngs)

    def constants(self) -> dict[str, Any]:
        return hashes.constants(hashes.hashes(self))


class OverEncoder(nnx.Module):
    def __init__(self, config: OverEncoding, D: int, *, rngs: nnx.Rngs):
        self.config, known = config, hashes.hashes(config)
        F = len(known.pairs) * config.K
        table_WK = jax.random.normal(rngs.params(), [known.rows, config.K], jnp.float32) * F**-0.5
        self.table = nnx.Param(table_WK, axes="WK", decay=False, table=True)
        self.out = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)

    def init_state(self, B: int) -> Array:
        """The last N - 1 canonical ids, int32 [B, N - 1]."""
        return jnp.full((B, self.config.N - 1), hashes.hashes(self.config).pad, jnp.int32)

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Array | None = None) -> Out:
        """x_BTD: the words' own embeddings."""
        c = self.config
        rows_BTR, ids_BN = hashes.addresses(c, tokens, state)
        e_BTRK = lookup(self.table[...], rows_BTR)
        parts = 1 + rows_BTR.shape[-1]
        y_BTD = x_BTD + self.out(e_BTRK.reshape(*e_BTRK.shape[:2], -1).astype(x_BTD.dtype))
        y_BTD = y_BTD / (parts if c.average == "mean" else parts**0.5)
        return Out(y_BTD, None if state is None else ids_BN, {"rows/table": asked(rows_BTR, tokens.pos_BT)})
