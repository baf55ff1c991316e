"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): a forget gate for each key channel, read from the input.

    S_t = diag(α_t) S_{t-1} + k_t v_t^T,  y_t = S_t^T q_t / sqrt(K),  α_t = σ(W_2 W_1 x_t + b)^(1/16)

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
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, above_zero, positive
from layers.norm import RMSNorm
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.recurrent import LowRank, Maps, Recurrent


@dataclasses.dataclass(frozen=True)
class GLA(LayerConfig):
    """H heads; K, V: key and value size of a head, None: D / 2 / H and D / H.

    R: rank of the forget gate. temperature: the root taken of it, so that it starts at 0.5^(1/16) = 0.96 on average.
    conv: width of the short convolution (with SiLU) on query, key and value; 0: none, as in the paper.
    norm_eps: of the norm of the output, as in layers.retention. chunk, implementation: as in layers.ops.linear.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    R: int = 16
    temperature: float = 16.0
    conv: int = 0
    norm_eps: float = 1e-4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "R", "chunk")
        above_zero(self, "temperature", "norm_eps")
        check_taps(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "GLALayer":
        return GLALayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(chunk=16), cls(H=2, K=12, V=20, R=4, temperature=1.0, conv=4, norm_eps=1e-2, chunk=8)


class GLAState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class GLALayer(Recurrent):
    def __init__(self, config: GLA, D: int, *, rngs: nnx.Rngs):
        K, V = head_size(config, "K", D, Fraction(1, 2)), head_size(config, "V", D)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=config.H, K=K, V=V, R=config.R, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        key, value = linear("BTD,DHK->BTHK"), linear("BTD,DHV->BTHV")
        self.gate = linear("BTD,DHV->BTHV")
        decay = LowRank(linear("BTD,DR->BTR"), linear("BTR,RHK->BTHK", bias=True))
        self.written = Maps(key=key, value=value, decay=decay)
        activation = jax.nn.silu if config.conv else None
        self.convs = ShortConvs(
            "HK", "HK", "HV", taps=config.conv, activation=activation, H=config.H, K=K, V=V, rngs=rngs
        )
        self.norm = RMSNorm(V, axes="V", eps=config.norm_eps)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> GLAState:
        return GLAState(jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32), self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: GLAState | None = None):
        c = self.config
        memory, tails = (None, None) if state is None else state
        log_decay = jax.nn.log_sigmoid(written["decay"].astype(wide(q))) / c.temperature
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        y, new = linear_recurrence(
            q * self.K**-0.5, k, v, log_decay, state=memory, pos=pos_BT, chunk=c.chunk, implementation=c.implementation
        )
        aux = {"decay": jnp.mean(jnp.exp(log_decay)).astype(jnp.float32)}
        return y, None if memory is None else GLAState(new.astype(memory.dtype), tails), aux

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, self.gate(x_BTD)))
