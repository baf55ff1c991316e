"""Lizard (Nguyen et al. 2025, arXiv 2507.09025): linear attention that forgets, beside softmax over a window.

    S_t = Γ_t S_{t-1} + φ_k(k_t) v_t^T,  z_t = Γ_t z_{t-1} + φ_k(k_t),  Γ_t = σ(w · x_t)
    gate_t = φ_q(q_t)^T S_t / φ_q(q_t)^T z_t
    anchor_t = Σ_s e^{q_t·k_s / sqrt(K)} v_s / (Σ_j t_j + Σ_s e^{q_t·k_s / sqrt(K)})        s: the last `window` tokens
    y_t = gate_t + α anchor_t

Both branches read the same q, k and v; only the anchor's are turned by their places. Γ is one number a token, the same
for all heads; φ are Hedgehog maps (layers/linear.py), one for queries and one for keys.

The paper made it of trained Transformers and leaves some of it open. Ours: φ with softmax, as its table of settings has
it (its equations print exp); the running sums divided by z, as in its parallel form; t_j = softplus of a Param, which
keeps the denominator above 0, for each head; α one number a layer that starts at 1; q, k, v and the maps as elsewhere.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.attention import AttentionState, empty_cache, number, remember
from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, one_of, positive
from layers.linear import EPSILON, hedgehog
from layers.ops.attention import attention
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.ops.rope import rope

LEAST = 1e-30  # of the sum of t_j, under its logarithm


@dataclasses.dataclass(frozen=True)
class Lizard(LayerConfig):
    """H heads; K: channels of queries, keys and values of a head, None: D / H.

    F: features of a head, both halves of its map together; None: K.
    window: tokens that the anchor sees, the token itself included.
    meta: number of t_j; 0: a plain softmax. Only their sum matters: m of them learn it m times as fast as one.
    gate: whether the gate branch forgets; without it Γ = 1. It starts at 0.5 on average, as in the paper, which has no
        bias: a memory of few tokens, until training widens it.
    rope_theta: base of the anchor's rotary embedding; None: no positions.
    chunk, implementation: as in layers.ops.linear; "naive" is the definition of the anchor too.

    Parameters: 4 D H K [= 4 D² for K = D / H] + H K F + D for the gate + H meta + 1. State of a row: H F (K + 1)
    numbers, and the cache of a window: 2 window H K numbers and window + 2 of int32.
    """

    H: int = 4
    K: int | None = None
    F: int | None = None
    window: int = 128
    meta: int = 4
    gate: bool = True
    rope_theta: float | None = 10_000.0
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "F", "window", "rope_theta", "chunk")
        one_of(self)
        if self.meta < 0:
            raise ValueError(f"Lizard.meta is {self.meta}: it must be at least 0")
        if self.F is not None and self.F % 2:
            raise ValueError(f"Lizard.F is {self.F}: a map has two halves of one width, so it must be even")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "LizardLayer":
        return LizardLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=2, K=8, F=12, window=6, chunk=8),
            cls(H=2, K=8, window=6, meta=0, gate=False, rope_theta=None, chunk=8),
        )


class LizardState(NamedTuple):
    """cache: of the anchor. memory_BHFV: S, and z as one more column."""

    cache: AttentionState
    memory_BHFV: Array


class LizardLayer(Layer):
    def __init__(self, config: Lizard, D: int, *, rngs: nnx.Rngs):
        H, K = config.H, head_size(config, "K", D)
        if config.rope_theta is not None:
            even(config, K)
        if config.F is None and K % 2:
            raise ValueError(f"Lizard.K is {K}: with F None it is the width of the features, so it must be even")
        self.config, self.K, self.F = config, K, config.F or K
        linear = partial(Einsum, D=D, H=H, K=K, V=K, F=self.F // 2, rngs=rngs)
        self.query, self.key = linear("BTD,DHK->BTHK"), linear("BTD,DHK->BTHK")
        self.value = linear("BTD,DHV->BTHV")
        self.query_map, self.key_map = linear("BTHK,HKF->BTHF"), linear("BTHK,HKF->BTHF")
        self.gate = linear("BTD,D->BT") if config.gate else None
        zeros_HS = jnp.zeros([H, config.meta], jnp.float32)
        self.meta = nnx.Param(zeros_HS, axes="HS", decay=False) if config.meta else None
        self.alpha = nnx.Param(jnp.ones([], jnp.float32), axes="", decay=False)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> LizardState:
        H, K = self.config.H, self.K
        cache = empty_cache(B, H, self.config.window, K, jnp.dtype(jnp.float32))
        return LizardState(cache, jnp.zeros((B, H, self.F, K + 1), jnp.float32))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: LizardState | None = None) -> Out:
        dtype = wide(x_BTD)
        cache, memory = (None, None) if state is None else state
        q, k, v = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        gate_BTHV, memory, aux = self._gate(x_BTD, q, k, v, tokens.pos_BT, memory)
        anchor_BTHV, cache = self._anchor(q, k, v, tokens.pos_BT, cache)
        y_BTHV = gate_BTHV + self.alpha[...].astype(dtype) * anchor_BTHV.astype(dtype)
        new = None if cache is None or memory is None else LizardState(cache, memory)
        return Out(self.out(y_BTHV.astype(x_BTD.dtype)), new, aux)

    def _gate(self, x_BTD: Array, q: Array, k: Array, v: Array, pos_BT: Array, memory: Array | None):
        """The branch that forgets, in at least float32, its memory, and what it says of itself."""
        c, dtype, aux = self.config, wide(x_BTD), {}
        log_decay = None
        if self.gate is not None:
            log_decay_BT = jax.nn.log_sigmoid(self.gate(x_BTD.astype(dtype)))
            log_decay = jnp.broadcast_to(log_decay_BT[..., None], q.shape[:3])
            aux["decay"] = jnp.mean(jnp.exp(log_decay_BT)).astype(jnp.float32)
        q, k = (hedgehog(a.astype(dtype)).astype(x_BTD.dtype) for a in (self.query_map(q), self.key_map(k)))
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
        y, new = linear_recurrence(
            q, k, v, log_decay, state=memory, pos=pos_BT, chunk=c.chunk, implementation=c.implementation
        )
        y = y.astype(dtype)
        total = y[..., self.K :]
        aux["normaliser"] = jnp.mean(total).astype(jnp.float32)
        return y[..., : self.K] / (total + EPSILON), None if memory is None else new.astype(memory.dtype), aux

    def _anchor(self, q: Array, k: Array, v: Array, pos_BT: Array, cache: AttentionState | None):
        """Softmax over the window, and its cache."""
        c = self.config
        if c.rope_theta is not None:
            q, k = rope(q, pos_BT, c.rope_theta), rope(k, pos_BT, c.rope_theta)
        if cache is not None:
            return remember(self._attend, q, k, v, pos_BT, cache, c.window)
        time_BT, since_BT = number(pos_BT, 0, 0)
        times = {"query_time": time_BT, "key_time": time_BT, "since": since_BT, "ordered": True}
        y = self._attend(q, k, v, window=c.window, **times)
        return y, None

    def _attend(self, q_BTHK: Array, k: Array, v: Array, **how: Any) -> Array:
        """Σ_j t_j stands in the denominator as one more key would that every token sees: score log Σ_j t_j, value 0."""
        if self.config.implementation == "naive":
            how["implementation"] = "naive"
        if self.meta is None:
            return attention(q_BTHK, k, v, **how)
        B, _, H, K = q_BTHK.shape
        dtype = wide(q_BTHK)
        total_H = jnp.sum(jax.nn.softplus(self.meta[...].astype(dtype)), -1)
        key_H = jnp.log(total_H + LEAST) * K**0.5  # the op divides every score by sqrt(K)
        key_B1H1 = jnp.broadcast_to(key_H[None, None, :, None], (B, 1, H, 1)).astype(q_BTHK.dtype)
        always = jnp.ones_like(q_BTHK[..., :1]), key_B1H1, jnp.zeros((B, 1, H, K), q_BTHK.dtype)
        return attention(q_BTHK, k, v, always=always, **how)
