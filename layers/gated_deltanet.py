"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a forget gate of one number a head.

    S_t = α_t (I - β_t k_t k_t^T) S_{t-1} + β_t k_t v_t^T,  y_t = S_t^T q_t / sqrt(K)
    β_t = σ(w x_t),  log α_t = -exp(A_log) softplus(a x_t + dt_bias)

The output is RMS-normalised per head and gated.
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
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, divides, positive
from layers.norm import RMSNorm, l2_norm
from layers.ops.delta import delta_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.recurrent import Maps, Recurrent


@dataclasses.dataclass(frozen=True)
class GatedDeltaNet(LayerConfig):
    """H heads with a memory each; K, V: key and value size of a head, None: 3/4 · D / H and 3/2 · D / H.

    G: groups of heads that share queries and keys (grouped values); None: H, no sharing.
    negative_eigenvalues: β in (0, 2) instead of (0, 1). gate: the output gate, silu(W x); V is best wider without it.
    conv: width of the short convolution on query, key and value; 0: none. SiLU follows either way.
    chunk, implementation: as in layers.ops.delta.

    exp(A_log) starts as U(0.001, 16): the paper's U(0, 16), kept off 0, whose log is infinite.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    G: int | None = None
    negative_eigenvalues: bool = False
    gate: bool = True
    conv: int = 4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "G", "chunk")
        check_taps(self)
        if self.G is not None:
            divides(self, "G", "H")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "GatedDeltaNetLayer":
        return GatedDeltaNetLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=4, chunk=16),
            cls(H=4, G=2, K=12, V=20, negative_eigenvalues=True, chunk=8),
            cls(H=2, gate=False, conv=0, chunk=16),
        )


class GatedDeltaNetState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class GatedDeltaNetLayer(Recurrent):
    def __init__(self, config: GatedDeltaNet, D: int, *, rngs: nnx.Rngs):
        H, G = config.H, config.G or config.H
        K, V = head_size(config, "K", D, Fraction(3, 4)), head_size(config, "V", D, Fraction(3, 2))
        self.config, self.K, self.V, self.shared = config, K, V, H // G
        linear = partial(Einsum, D=D, H=H, G=G, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DGK->BTGK")
        self.written = Maps(
            key=linear("BTD,DGK->BTGK"),
            value=linear("BTD,DHV->BTHV"),
            beta=linear("BTD,DH->BTH"),
            step=linear("BTD,DH->BTH"),
        )
        self.decay = MambaDecay("H", A=(1e-3, 16.0), H=H, rngs=rngs)
        self.convs = ShortConvs(
            "GK", "GK", "HV", taps=config.conv, activation=jax.nn.silu, H=H, G=G, K=K, V=V, rngs=rngs
        )
        self.gate = linear("BTD,DHV->BTHV") if config.gate else None
        self.norm = RMSNorm(V, axes="V")
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> GatedDeltaNetState:
        memory_BHKV = jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32)
        return GatedDeltaNetState(memory_BHKV, self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: GatedDeltaNetState | None = None):
        c, dtype = self.config, wide(q)
        memory, tails = (None, None) if state is None else state
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        q, k = l2_norm(q) * self.K**-0.5, l2_norm(k)
        if self.shared > 1:
            q, k = jnp.repeat(q, self.shared, 2), jnp.repeat(k, self.shared, 2)
        beta = (1 + c.negative_eigenvalues) * jax.nn.sigmoid(written["beta"].astype(dtype))
        log_decay, _ = self.decay(written["step"])
        y, new = delta_recurrence(
            q, k, v, beta, log_decay, state=memory, pos=pos_BT, chunk=c.chunk, implementation=c.implementation
        )
        aux = {"beta": jnp.mean(beta).astype(jnp.float32), "decay": jnp.mean(jnp.exp(log_decay)).astype(jnp.float32)}
        state = None if memory is None else GatedDeltaNetState(new.astype(memory.dtype), tails)
        return y, state, aux

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, None if self.gate is None else self.gate(x_BTD)))
