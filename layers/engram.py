"""Engram (Cheng et al. 2026, arXiv 2601.07372): what the last few tokens usually mean, looked up in a large table.

    e_t = rows of a table at the hashes of the last 2, ..., N tokens, H of each        (layers/hashes.py)
    s = <RMSNorm(x_t), RMSNorm(W_K e_t)> / sqrt(D)        α = σ(sign(s) sqrt|s|)  or  σ(s)
    v = α W_V e_t        y_t = v + silu(conv(RMSNorm(v)))

The addresses need no more than the ids: the rows could be fetched before the model runs. The convolution has taps N
apart and starts as zeros. The paper prints σ(s); its public demo takes the root, which keeps σ out of saturation.

Of G residual streams each asks and filters for itself, of one table and one W_V (section 2.4, eq. 6):

    s_g = <RMSNorm_g(x_tg), RMSNorm_g(W_Kg e_t)> / sqrt(D)        v_g = α_g W_V e_t
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers import hashes
from layers.conv import ShortConv
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.norm import RMSNorm
from layers.ops.precision import wide
from layers.ops.tables import asked, lookup

LEAST = 1e-6  # of |s| under its root, as in the demo


@dataclasses.dataclass(frozen=True)
class Engram(LayerConfig):
    """W: entries of the vocabulary. layer: which of `layers` this is; each has hashes and primes of its own.

    N: longest n-gram. H: hashes of each order. K: width of a row. rows: at least so many for each order and hash (one
        number, or one for each order); the primes from there on are taken.
    streams: residual streams that lie side by side in the input and the output, each as wide as the model; the model's
        (LM.streams), or 1 for an ordinary layer, which in a model of several reads a mix of them (the paper's ablation
        of section 6.2).
    gate: "signed_sqrt" or "plain". conv: taps of the convolution; 0: none, which is cheaper to decode.
    identity: W_V starts at zero, and so does the layer's output.
    pad: the id that stands before a document's first token. seed: of the multipliers.
    canonical: None, or a file of NumPy's (.npy) with an int for each id: ids of equal meaning share theirs
        (layers.ops.ngram.canonical makes one).
    multipliers: None to draw them; or those that a checkpoint was made with, should NumPy ever draw others.

    A table's rows start as N(0, 1 / (width of e)); they are trained by Adam at several times the learning rate, without
    decay (training/optimizer.py).
    """

    W: int = 257
    layer: int = 0
    layers: tuple[int, ...] = (0,)
    N: int = 3
    H: int = 8
    K: int = 16
    rows: int | tuple[int, ...] = 1 << 14
    streams: int = 1
    gate: Literal["signed_sqrt", "plain"] = "signed_sqrt"
    conv: int = 4
    identity: bool = False
    pad: int = 0
    seed: int = 0
    canonical: str | None = None
    multipliers: tuple[int, ...] | None = None

    def __post_init__(self):
        one_of(self)
        hashes.check(self)
        positive(self, "streams")
        if self.conv < 0 or self.conv == 1:
            raise ValueError(f"Engram.conv is {self.conv}: it must be 0 (no convolution) or at least 2")
        if self.layer not in self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"Engram.layers is {self.layers}: it must hold layer = {self.layer}, and each once")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "EngramLayer":
        return EngramLayer(self, D, rngs=rngs)

    def hashes(self) -> hashes.Hashes:
        return hashes.hashes(self)

    def constants(self) -> dict[str, Any]:
        return hashes.constants(self.hashes())

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(W=50, H=2, K=4, rows=50),
            cls(W=50, N=4, H=1, K=6, rows=(30, 40, 50), gate="plain", conv=0, layer=3, layers=(1, 3), pad=2),
            cls(W=50, N=2, H=2, K=6, rows=50, streams=4),
        )


class EngramState(NamedTuple):
    """ids_BN: int32, the last N - 1 canonical ids. tail: of the convolution, or ()."""

    ids_BN: Array
    tail: Any


class EngramLayer(Layer):
    def __init__(self, config: Engram, D: int, *, rngs: nnx.Rngs):
        c, self.config, G = config, config, config.streams
        if D % G:
            fit = ", ".join(str(n) for n in range(1, D + 1) if D % n == 0)
            raise ValueError(
                f"Engram.streams is {G}, which does not divide the width that it reads, {D}: use one of {fit}"
            )
        known = c.hashes()
        F = len(known.pairs) * c.K
        table_WK = jax.random.normal(rngs.params(), [known.rows, c.K], jnp.float32) * F**-0.5
        self.table = nnx.Param(table_WK, axes="WK", decay=False, table=True)
        self.key = Einsum("BTF,FD->BTD", F=F, D=D, rngs=rngs)
        self.value = Einsum("BTF,FD->BTD", F=F, D=D // G, scale=0.0 if c.identity else 1.0, residual=True, rngs=rngs)
        self.query_norm, self.key_norm = RMSNorm(D, parts=G), RMSNorm(D, parts=G)
        self.norm = RMSNorm(D, parts=G) if c.conv else None
        self.conv = ShortConv("D", D=D, taps=c.conv, dilation=c.N, zeros=True, rngs=rngs) if c.conv else None

    def init_state(self, B: int, T: int) -> EngramState:
        tail = () if self.conv is None else self.conv.init_tail(B)
        return EngramState(jnp.full((B, self.config.N - 1), self.config.hashes().pad, jnp.int32), tail)

    def __call__(self, x_BTD: Array, tokens: Tokens, state: EngramState | None = None) -> Out:
        pos = tokens.pos_BT
        rows_BTR, ids_BN = self.addresses(tokens, None if state is None else state.ids_BN)
        v_BTD, share = self.fuse(x_BTD, self.lookup(rows_BTR))
        y_BTD, tail = v_BTD, None if state is None else state.tail
        if self.conv is not None and self.norm is not None:
            filtered, tail = self.conv(self.norm(v_BTD), pos, tail)
            y_BTD = y_BTD + jax.nn.silu(filtered)
        said = {"gate": share, "rows/table": asked(rows_BTR, pos)}
        return Out(y_BTD, None if state is None else EngramState(ids_BN, tail), said)

    def addresses(self, tokens: Tokens, before_BN: Array | None = None) -> tuple[Array, Array]:
        """(rows of the table [B, T, R] int32, the last N - 1 canonical ids); nothing but ids and places is read.

        before_BN: canonical ids of the tokens before.
        """
        return hashes.addresses(self.config, tokens, before_BN)

    def lookup(self, rows_BTR: Array) -> Array:
        """[B, T, R K] in the table's dtype. Rows are in the table by what `addresses` is."""
        e = lookup(self.table[...], rows_BTR)
        return e.reshape(*e.shape[:2], -1)

    def fuse(self, x_BTD: Array, e_BTF: Array) -> tuple[Array, Array]:
        """(what is looked up as far as it fits the context, the gates' mean). x_BTD: all streams, side by side."""
        dtype, e, G = wide(x_BTD), e_BTF.astype(x_BTD.dtype), self.config.streams
        query, key = self.query_norm(x_BTD.astype(dtype)), self.key_norm(self.key(e).astype(dtype))
        fit_BTGD = (query * key).reshape(*x_BTD.shape[:2], G, -1)
        s_BTG1 = jnp.sum(fit_BTGD, -1, keepdims=True) / math.sqrt(fit_BTGD.shape[-1])
        if self.config.gate == "signed_sqrt":
            s_BTG1 = jnp.sign(s_BTG1) * jnp.sqrt(jnp.maximum(jnp.abs(s_BTG1), LEAST))
        gate_BTG1 = jax.nn.sigmoid(s_BTG1)
        v_BTGD = (gate_BTG1 * self.value(e).astype(dtype)[:, :, None]).astype(x_BTD.dtype)
        return v_BTGD.reshape(x_BTD.shape), jnp.mean(gate_BTG1).astype(jnp.float32)
