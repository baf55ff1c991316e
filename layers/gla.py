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
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, positive
from layers.norm import RMSNorm
from layers.ops.linear import linear_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation


@dataclasses.dataclass(frozen=True)
class GLA(LayerConfig):
    """H heads; K, V: key and value size of a head, None: D / 2 / H and D / H.

    R: rank of the forget gate. temperature: the root taken of it, so that it starts at 0.5^(1/16) = 0.96 on average.
    conv: width of the short convolution (with SiLU) on query, key and value; 0: none, as in the paper.
    chunk, implementation: as in layers.ops.linear.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    R: int = 16
    temperature: float = 16.0
    conv: int = 0
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "R", "chunk")
        check_taps(self)
        if self.temperature <= 0:
            raise ValueError(f"GLA.temperature is {self.temperature}: it must be above 0")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "GLALayer":
        return GLALayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(chunk=16), cls(H=2, K=12, V=20, R=4, temperature=1.0, conv=4, chunk=8)


class GLAState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class GLALayer(Layer):
    def __init__(self, config: GLA, D: int, *, rngs: nnx.Rngs):
        K, V = head_size(config, "K", D, Fraction(1, 2)), head_size(config, "V", D)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=config.H, K=K, V=V, R=config.R, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        self.key = linear("BTD,DHK->BTHK")
        self.value = linear("BTD,DHV->BTHV")
        self.gate = linear("BTD,DHV->BTHV")
        self.decay_down = linear("BTD,DR->BTR")
        self.decay_up = linear("BTR,RHK->BTHK", bias=True)
        activation = jax.nn.silu if config.conv else None
        self.convs = ShortConvs(
            "HK", "HK", "HV", taps=config.conv, activation=activation, H=config.H, K=K, V=V, rngs=rngs
        )
        self.norm = RMSNorm(V, axes="V")
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> GLAState:
        return GLAState(jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32), self.convs.init_tails(B))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: GLAState | None = None) -> Out:
        c, pos = self.config, tokens.pos_BT
        memory, tails = (None, None) if state is None else state
        streams = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        (q, k, v), tails = self.convs(streams, pos, tails)
        log_decay = jax.nn.log_sigmoid(self.decay_up(self.decay_down(x_BTD)).astype(wide(x_BTD))) / c.temperature
        y, new = linear_recurrence(
            q * self.K**-0.5, k, v, log_decay, state=memory, pos=pos, chunk=c.chunk, implementation=c.implementation
        )
        y_BTD = self.out(self.norm(y, self.gate(x_BTD)))
        aux = {"decay": jnp.mean(jnp.exp(log_decay)).astype(jnp.float32)}
        return Out(y_BTD, None if memory is None else GLAState(new.astype(memory.dtype), tails), aux)
