"""Kimi Delta Attention (Kimi Linear report 2025, arXiv 2510.26692): the delta rule, forgetting by key channel.

    S_t = (I - β_t k_t k_t^T) diag(α_t) S_{t-1} + β_t k_t v_t^T,  y_t = S_t^T q_t / sqrt(K)
    β_t = σ(w x_t),  log α_t = -exp(A_log) softplus(W_2 W_1 x_t + dt_bias)
    out = W [RMSNorm(y) ∘ weight ∘ σ(U_2 U_1 x + b)]

Two gates of low rank: the forget gate W_2 W_1, the output gate U_2 U_1.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.decay import MambaDecay
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, positive
from layers.norm import RMSNorm, l2_norm
from layers.ops.delta import delta_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.recurrent import LowRank, Maps, Recurrent


@dataclasses.dataclass(frozen=True)
class KDA(LayerConfig):
    """H heads; K, V: key and value size of a head, None: D / H.

    R: rank of the forget gate and of the output gate; None: V, as in the report.
    bound: None, or the least log decay, in [-5, 0): then log α = bound · σ(exp(A_log) (W_2 W_1 x + dt_bias)).
    negative_eigenvalues: β in (0, 2) instead of (0, 1).
    conv: width of the short convolution on query, key and value; 0: none. SiLU follows either way.
    chunk, implementation: as in layers.ops.delta.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    R: int | None = None
    bound: float | None = None
    negative_eigenvalues: bool = False
    conv: int = 4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "R", "chunk")
        check_taps(self)
        if self.bound is not None and not -5 <= self.bound < 0:
            raise ValueError(f"KDA.bound is {self.bound}: it must be in [-5, 0), or None for no bound")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "KDALayer":
        return KDALayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=4, chunk=16),
            cls(H=2, K=12, V=20, R=6, bound=-5.0, negative_eigenvalues=True, conv=0, chunk=8),
        )


class KDAState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class KDALayer(Recurrent):
    def __init__(self, config: KDA, D: int, *, rngs: nnx.Rngs):
        H, K, V = config.H, head_size(config, "K", D), head_size(config, "V", D)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=H, K=K, V=V, R=config.R or V, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        self.written = Maps(
            key=linear("BTD,DHK->BTHK"),
            value=linear("BTD,DHV->BTHV"),
            beta=linear("BTD,DH->BTH"),
            decay=LowRank(linear("BTD,DR->BTR"), linear("BTR,RHK->BTHK")),
        )
        self.decay = MambaDecay("HK", bound=config.bound, H=H, K=K, rngs=rngs)
        self.convs = ShortConvs("HK", "HK", "HV", taps=config.conv, activation=jax.nn.silu, H=H, K=K, V=V, rngs=rngs)
        self.gate = LowRank(linear("BTD,DR->BTR"), linear("BTR,RHV->BTHV", bias=True))
        self.norm = RMSNorm(V, axes="V", activation=jax.nn.sigmoid)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> KDAState:
        return KDAState(jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32), self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: KDAState | None = None):
        c = self.config
        memory, tails = (None, None) if state is None else state
        beta = (1 + c.negative_eigenvalues) * jax.nn.sigmoid(written["beta"].astype(wide(q)))
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        log_decay, _ = self.decay(written["decay"])
        y, new = delta_recurrence(
            l2_norm(q) * self.K**-0.5,
            l2_norm(k),
            v,
            beta,
            log_decay,
            state=memory,
            pos=pos_BT,
            chunk=c.chunk,
            implementation=c.implementation,
        )
        aux = {"beta": jnp.mean(beta).astype(jnp.float32), "decay": jnp.mean(jnp.exp(log_decay)).astype(jnp.float32)}
        return y, None if memory is None else KDAState(new.astype(memory.dtype), tails), aux

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, self.gate(x_BTD)))
