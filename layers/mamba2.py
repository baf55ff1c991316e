"""Mamba-2, or state-space duality (Dao & Gu 2024, arXiv 2405.21060): one decay a head, tied to how much is written.

    step_t = softplus(dt_t + dt_bias),  S_t = exp(-exp(A_log) step_t) S_{t-1} + B_t (step_t x_t)^T
    y_t = S_t^T C_t + skip x_t,  out = W [RMSNorm(y ∘ silu(z)) ∘ weight]

The paper's x, B, C, z are the value, key, query and gate of the other layers; the heads of a group share B and C.
"""

import dataclasses
from fractions import Fraction
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.decay import MambaDecay
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, positive
from layers.norm import rms_norm
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation


@dataclasses.dataclass(frozen=True)
class Mamba2(LayerConfig):
    """expand · D channels in heads of V, each with a memory of K x V; G groups of heads share queries and keys.

    H: heads; None: expand · D / V. conv: width of the short convolution, with bias and SiLU, on value, key and query.
    chunk, implementation: as in layers.ops.linear.
    """

    H: int | None = None
    K: int = 128
    V: int = 64
    G: int = 1
    expand: int = 2
    conv: int = 4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "G", "expand", "chunk")
        check_taps(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "Mamba2Layer":
        return Mamba2Layer(self, D, rngs=rngs)

    def heads(self, D: int) -> int:
        """H at width D. Raises ValueError if the sizes do not divide."""
        H = Fraction(self.expand * D, self.V) if self.H is None else Fraction(self.H)
        if H.denominator > 1:
            raise ValueError(f"Mamba2.V is {self.V}, which does not divide expand · D = {self.expand * D}")
        if H.numerator % self.G:
            raise ValueError(f"Mamba2.G is {self.G}, which does not divide the {H} heads")
        return H.numerator

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(K=16, V=32, chunk=16), cls(H=6, K=12, V=8, G=2, conv=0, chunk=8), cls(K=8, V=16, G=2, expand=1)


class Mamba2State(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class Mamba2Layer(Layer):
    def __init__(self, config: Mamba2, D: int, *, rngs: nnx.Rngs):
        H, G, K, V = config.heads(D), config.G, config.K, config.V
        self.config, self.H = config, H
        linear = partial(Einsum, D=D, H=H, G=G, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DGK->BTGK")
        self.key = linear("BTD,DGK->BTGK")
        self.value = linear("BTD,DHV->BTHV")
        self.gate = linear("BTD,DHV->BTHV")
        self.step = linear("BTD,DH->BTH")
        self.convs = ShortConvs(
            "GK", "GK", "HV", taps=config.conv, bias=True, activation=jax.nn.silu, H=H, G=G, K=K, V=V, rngs=rngs
        )
        self.decay = MambaDecay("H", H=H, rngs=rngs)
        self.skip = nnx.Param(jnp.ones([H], jnp.float32), axes="H", decay=False)
        self.norm = nnx.Param(jnp.ones([H, V], jnp.float32), axes="HV", decay=False)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> Mamba2State:
        memory_BHKV = jnp.zeros((B, self.H, self.config.K, self.config.V), jnp.float32)
        return Mamba2State(memory_BHKV, self.convs.init_tails(B))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: Mamba2State | None = None) -> Out:
        c, pos, dtype = self.config, tokens.pos_BT, wide(x_BTD)
        memory, tails = (None, None) if state is None else state
        streams = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        (q, k, v), tails = self.convs(streams, pos, tails)
        log_decay, step = self.decay(self.step(x_BTD))
        q, k = (jnp.repeat(a, self.H // c.G, 2) for a in (q, k))
        v = v.astype(dtype)
        y, new = linear_recurrence(
            q,
            k,
            (v * step[..., None]).astype(x_BTD.dtype),
            log_decay,
            state=memory,
            pos=pos,
            chunk=c.chunk,
            implementation=c.implementation,
        )
        y = y.astype(dtype) + v * self.skip[...].astype(dtype)[None, None, :, None]
        y = y * jax.nn.silu(self.gate(x_BTD).astype(dtype))
        grouped = rms_norm(y.reshape(*y.shape[:2], c.G, -1), 1e-5)
        y = grouped.reshape(y.shape) * self.norm[...].astype(dtype)[None, None]
        aux = {"decay": jnp.mean(jnp.exp(log_decay)).astype(jnp.float32), "step": jnp.mean(step).astype(jnp.float32)}
        state = None if memory is None else Mamba2State(new.astype(memory.dtype), tails)
        return Out(self.out(y.astype(x_BTD.dtype)), state, aux)
