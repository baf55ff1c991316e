"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) with the feature maps of the literature.

    S_t = S_{t-1} + φ(k_t) v_t^T,  z_t = z_{t-1} + φ(k_t),  y_t = φ(q_t)^T S_t / (φ(q_t)^T z_t)

z is carried as one more value column, of ones.
"""

import dataclasses
import math
from functools import partial
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, one_of, positive
from layers.norm import RMSNorm
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.recurrent import Maps, Recurrent

FeatureMap = Literal["elu", "relu", "identity", "taylor", "hedgehog"]
EPSILON = 1e-6  # beside the normaliser, so that a query that matches no key (relu) gives 0


def taylor(x: Array) -> Array:
    """φ(q)·φ(k) = 1 + s + s²/2, s = q·k / sqrt(K): exp(s) to second order (Based, arXiv 2402.18668).

    [..., K] -> [..., 1 + K + K (K + 1) / 2]: each product of two channels once, as channel i with i + shift (mod K).
    """
    K = x.shape[-1]
    twice = jnp.concatenate([x, x], -1)
    products = [x * x * math.sqrt(0.5 / K)]
    for shift in range(1, K // 2 + 1):
        n = K // 2 if 2 * shift == K else K  # half a turn away, the second half repeats the first
        products.append(x[..., :n] * twice[..., shift : shift + n] * K**-0.5)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x * K**-0.25, *products], -1)


def hedgehog(x: Array) -> Array:
    """[softmax(x), softmax(-x)], each at least 1e-12: rows sum to 2 (Hedgehog, arXiv 2402.04347, as LoLCATs has it)."""
    return jnp.maximum(jnp.concatenate([jax.nn.softmax(x, -1), jax.nn.softmax(-x, -1)], -1), 1e-12)


MAPS = {
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
    "taylor": taylor,
    "hedgehog": hedgehog,
}


@dataclasses.dataclass(frozen=True)
class LinearAttention(LayerConfig):
    """H heads, each with a memory of φ(key) x value.

    feature_map: "elu" (elu + 1), "relu", "identity", "taylor" (Based) or "hedgehog" (a learned map a head, one for the
        queries and one for the keys).
    normaliser: divide by the sum of the weights. Without it the query is scaled by K^-0.5 (not for "taylor" and
        "hedgehog", which set their own scale) and each head's output is RMS-normalised instead.
    K, V: key and value size of a head; None: D / H (K = 16 for "taylor", whose memory has 1 + K + K (K + 1) / 2 rows).
    F: "hedgehog": width of each of its two halves; None: K / 2.
    conv: width of the short convolution (with SiLU) on query, key and value; 0: none, as in the papers.
    chunk, implementation: as in layers.ops.linear.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    feature_map: FeatureMap = "elu"
    normaliser: bool = True
    F: int | None = None
    conv: int = 0
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "F", "chunk")
        check_taps(self)
        one_of(self)
        if self.normaliser and self.feature_map == "identity":
            raise ValueError(
                'LinearAttention.normaliser is True with feature_map "identity", whose weights may sum to 0: '
                "set normaliser False, or choose a positive map"
            )
        if self.F is not None and self.feature_map != "hedgehog":
            raise ValueError(f'LinearAttention.F is {self.F}: only feature_map "hedgehog" has it, so leave it None')

    def build(self, D: int, *, rngs: nnx.Rngs) -> "LinearAttentionLayer":
        return LinearAttentionLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=4, V=12, chunk=16),
            cls(H=2, K=6, feature_map="taylor", chunk=16),
            cls(H=4, feature_map="hedgehog", F=6, chunk=16),
            cls(H=4, feature_map="relu", conv=4, chunk=8),
            cls(H=4, feature_map="identity", normaliser=False, chunk=16),
        )


class LinearAttentionState(NamedTuple):
    """memory_BHKV: rows of φ(key), columns of the value and, if normalised, one for the sum. tails: see ShortConv."""

    memory_BHKV: Array
    tails: Tails


class LinearAttentionLayer(Recurrent):
    def __init__(self, config: LinearAttention, D: int, *, rngs: nnx.Rngs):
        H = config.H
        K = 16 if config.feature_map == "taylor" and config.K is None else head_size(config, "K", D)
        V = head_size(config, "V", D)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=H, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        self.written = Maps(key=linear("BTD,DHK->BTHK"), value=linear("BTD,DHV->BTHV"))
        activation = jax.nn.silu if config.conv else None
        self.convs = ShortConvs("HK", "HK", "HV", taps=config.conv, activation=activation, H=H, K=K, V=V, rngs=rngs)
        F = config.F or -(-K // 2)
        learned = config.feature_map == "hedgehog"
        self.query_map = linear("BTHK,HKF->BTHF", F=F) if learned else None
        self.key_map = linear("BTHK,HKF->BTHF", F=F) if learned else None
        self.features = {"taylor": 1 + K + K * (K + 1) // 2, "hedgehog": 2 * F}.get(config.feature_map, K)
        self.norm = None if config.normaliser else RMSNorm(V, axes="V")
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> LinearAttentionState:
        shape = (B, self.config.H, self.features, self.V + self.config.normaliser)
        return LinearAttentionState(jnp.zeros(shape, jnp.float32), self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: LinearAttentionState | None = None):
        c, narrow, dtype = self.config, q.dtype, wide(q)
        memory, tails = (None, None) if state is None else state
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        if self.query_map is not None:
            q = self.query_map(q)
        q = MAPS[c.feature_map](q.astype(dtype))
        if not c.normaliser and c.feature_map not in ("taylor", "hedgehog"):
            q = q * self.K**-0.5
        y, new = self.recur(q.astype(narrow), *self.told(k, v), written, memory, pos_BT)
        aux = {}
        if c.normaliser:
            y = y.astype(dtype)
            total = y[..., self.V :]
            aux["normaliser"] = jnp.mean(total).astype(jnp.float32)
            y = (y[..., : self.V] / (total + EPSILON)).astype(narrow)
        state = None if memory is None else LinearAttentionState(new.astype(memory.dtype), tails)
        return y, state, aux

    def told(self, k: Array, v: Array) -> tuple[Array, Array]:
        """The features of keys; values, with a column of ones for the normaliser."""
        if self.key_map is not None:
            k = self.key_map(k)
        if self.config.normaliser:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
        return MAPS[self.config.feature_map](k.astype(wide(k))).astype(k.dtype), v

    def recur(self, q: Array, k: Array, v: Array, written: dict[str, Array], memory: Array | None, pos_BT: Array):
        """(y, memory) of features and values."""
        c = self.config
        return linear_recurrence(q, k, v, state=memory, pos=pos_BT, chunk=c.chunk, implementation=c.implementation)

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(y_BTHV if self.norm is None else self.norm(y_BTHV))
