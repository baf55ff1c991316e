"""Retention, the memory of RetNet (Sun et al. 2023, arXiv 2307.08621): each head forgets at a pace of its own, fixed.

    S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,  y_t = S_t^T q_t / sqrt(K)        head h = 0 .. H-1

Queries and keys carry rotary positions (the paper's xPos is a variant of them); the output is RMS-normalised per head
and gated.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, above_zero, positive
from layers.norm import RMSNorm
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.ops.rope import rope


@dataclasses.dataclass(frozen=True)
class Retention(LayerConfig):
    """H heads; K, V: key and value size of a head, None: D / H and 2 · D / H.

    theta: base of the rotary positions. conv: width of the short convolution (with SiLU) on query, key and value; 0:
    none, as in the paper. norm_eps: of the norm of the output. A document's first token reads (k · q) v, whose norm
    turns from -v / |v| to v / |v| where k · q passes 0, and eps is how abruptly: with 1e-6 or 1e-5, as in
    flash-linear-attention, a run's losses come to hang on rounding, and fall less (results/meshes).
    chunk, implementation: as in layers.ops.linear.
    """

    H: int = 8
    K: int | None = None
    V: int | None = None
    theta: float = 10_000.0
    conv: int = 0
    norm_eps: float = 1e-4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "chunk", "theta")
        above_zero(self, "norm_eps")
        check_taps(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "RetentionLayer":
        return RetentionLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(H=4, chunk=16), cls(H=2, K=12, V=20, theta=500.0, conv=3, norm_eps=1e-2, chunk=8)


class RetentionState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class RetentionLayer(Layer):
    def __init__(self, config: Retention, D: int, *, rngs: nnx.Rngs):
        K, V = head_size(config, "K", D), head_size(config, "V", D, 2)
        even(config, K)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=config.H, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        self.key = linear("BTD,DHK->BTHK")
        self.value = linear("BTD,DHV->BTHV")
        self.gate = linear("BTD,DHV->BTHV")
        activation = jax.nn.silu if config.conv else None
        self.convs = ShortConvs(
            "HK", "HK", "HV", taps=config.conv, activation=activation, H=config.H, K=K, V=V, rngs=rngs
        )
        self.norm = RMSNorm(V, axes="V", eps=config.norm_eps)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> RetentionState:
        memory_BHKV = jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32)
        return RetentionState(memory_BHKV, self.convs.init_tails(B))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: RetentionState | None = None) -> Out:
        c, pos = self.config, tokens.pos_BT
        memory, tails = (None, None) if state is None else state
        streams = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        (q, k, v), tails = self.convs(streams, pos, tails)
        q, k = rope(q * self.K**-0.5, pos, c.theta), rope(k, pos, c.theta)
        log_decay_H = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(c.H, dtype=wide(x_BTD)))))
        log_decay = jnp.broadcast_to(log_decay_H[None, None], q.shape[:3])
        y, new = linear_recurrence(
            q, k, v, log_decay, state=memory, pos=pos, chunk=c.chunk, implementation=c.implementation
        )
        y_BTD = self.out(self.norm(y, self.gate(x_BTD)))
        return Out(y_BTD, None if memory is None else RetentionState(new.astype(memory.dtype), tails))
