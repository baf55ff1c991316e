"""Product-key memory (Lample et al. 2019, arXiv 1907.05242), and Memory+ (Berges et al. 2024, arXiv 2412.09764).

    q_t = norm(W_Q x_t + b)        S, w = the best slots of n², and their weights        (layers/ops/product_keys.py)
    m_t = sum over heads and S of w · value        y_t = m_t  or, with V other than D,  W_O m_t
    Memory+:  y_t = W_O (m_t ∘ silu(W_G x_t))

It replaces an MLP. A token reads H · top rows of a table of n², whose size costs it 2 H n products with keys. Its
addresses depend on the stream: unlike Engram's, the rows cannot be fetched before the model runs.
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.norm import LayerNorm, RMSNorm
from layers.ops.precision import HIGHEST, wide
from layers.ops.product_keys import product_keys, usage
from layers.ops.tables import asked, weighted_sum

MOST_KEYS = 46_340  # whose square is the last below 2³¹


@dataclasses.dataclass(frozen=True)
class ProductKeyMemory(LayerConfig):
    """H: heads. K: channels of a head's query, both halves. keys: n, of each half. top: slots that a head reads.

    V: width of a value; None = D.
    gate: "silu" (Memory+), or "none": Lample et al.
    norm: of each head's query. Lample et al. take BatchNorm, which would let tokens see one another; Memory+ none.
    bias: of W_Q.
    shared: the repeats of a stage read one table, each by keys of its own (models/lm.py), as Memory+ does.

    Defaults are those of Memory+ but for `shared`. Values start as N(0, 1 / V), keys as U(-1, 1) / sqrt(K); values are
    trained by Adam at several times the learning rate, without decay (training/optimizer.py).
    """

    H: int = 4
    keys: int = 1024
    top: int = 32
    K: int = 512
    V: int | None = None
    gate: Literal["silu", "none"] = "silu"
    norm: Literal["none", "rms", "layer"] = "none"
    bias: bool = True
    shared: bool = False

    def __post_init__(self):
        positive(self, "H", "keys", "K", "V")
        one_of(self)
        if not 2 <= self.top <= self.keys:
            raise ValueError(
                f"ProductKeyMemory.top is {self.top}: it must be from 2 (the weight of one slot alone is 1, "
                f"and its keys have no slope) to keys = {self.keys}"
            )
        if self.K % 2:
            raise ValueError(f"ProductKeyMemory.K is {self.K}: it must be even, since each half has keys of its own")
        if self.keys > MOST_KEYS:
            raise ValueError(f"ProductKeyMemory.keys is {self.keys}: slots have 32 bits, so at most {MOST_KEYS} keys")

    @property
    def slots(self) -> int:
        return self.keys**2

    def build(self, D: int, *, rngs: nnx.Rngs) -> "ProductKeyMemoryLayer":
        return ProductKeyMemoryLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=2, keys=10, top=3, K=8, V=24),
            cls(H=3, keys=40, top=2, K=6, gate="none", norm="layer", bias=False),
            cls(H=2, keys=6, top=6, K=4, V=8, gate="none", norm="rms", shared=True),
        )


class ProductKeyMemoryLayer(Layer):
    pointwise = True

    def __init__(self, config: ProductKeyMemory, D: int, *, rngs: nnx.Rngs):
        c, self.config, V = config, config, config.V or D
        narrow = (2 * D / (D + c.H * c.K)) ** 0.5  # Glorot's deviation
        self.query = Einsum("BTD,DHK->BTHK", D=D, H=c.H, K=c.K, scale=narrow, bias=c.bias, rngs=rngs)
        self.norm = LayerNorm("K", K=c.K) if c.norm == "layer" else RMSNorm(c.K, axes="K") if c.norm == "rms" else None
        shape, bound = (c.H, c.keys, c.K // 2), c.K**-0.5
        self.row, self.column = (
            nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes="HSK")
            for _ in range(2)
        )
        mapped = c.gate == "silu" or V != D
        values_WV = jax.random.normal(rngs.params(), [c.slots, V], jnp.float32) * V**-0.5
        self.values = nnx.Param(values_WV, axes="WV", decay=False, table=True, residual=not mapped, shared=c.shared)
        self.gate = Einsum("BTD,DV->BTV", D=D, V=V, rngs=rngs) if c.gate == "silu" else None
        self.out = Einsum("BTV,VD->BTD", V=V, D=D, residual=True, rngs=rngs) if mapped else None

    def init_state(self, B: int, T: int) -> tuple[()]:
        return ()

    def __call__(self, x_BTD: Array, tokens: Tokens, state: tuple[()] | None = None) -> Out:
        slot_BTR, weight_BTR = self.slots(x_BTD)
        y_BTV = weighted_sum(self.values[...], slot_BTR, weight_BTR).astype(x_BTD.dtype)
        if self.gate is not None:
            y_BTV = y_BTV * jax.nn.silu(self.gate(x_BTD))
        live_BT1 = (tokens.pos_BT >= 0)[..., None]
        used, apart = usage(slot_BTR, jnp.where(live_BT1, jax.lax.stop_gradient(weight_BTR), 0), self.config.slots)
        said = {"used": used.astype(jnp.float32), "kl": apart.astype(jnp.float32)}
        said["rows/values"] = asked(slot_BTR, tokens.pos_BT)
        return Out(y_BTV if self.out is None else self.out(y_BTV), state, said)

    def slots(self, x_BTD: Array) -> tuple[Array, Array]:
        """(rows of the table that each token reads [B, T, H top] int32, their weights in at least float32)."""
        # In full float32 wherever it runs: rounded otherwise, a token would read elsewhere when it is decoded.
        dtype = wide(x_BTD)
        q_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD.astype(dtype), self.query.w[...].astype(dtype), precision=HIGHEST)
        if self.query.b is not None:
            q_BTHK = q_BTHK + self.query.b[...].astype(dtype)[None, None]
        if self.norm is not None:
            q_BTHK = self.norm(q_BTHK)
        found = product_keys(q_BTHK, self.row[...], self.column[...], self.config.top)
        slot_BTR, weight_BTR = (a.reshape(*a.shape[:2], -1) for a in found)
        return slot_BTR, weight_BTR
