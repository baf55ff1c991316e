"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484): a memory that corrects itself.

    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}^T k_t)^T,  y_t = S_t^T q_t / sqrt(K),  β_t = σ(w x_t)

One step of online gradient descent on |S^T k - v|²: what is stored at the key is replaced, not added to.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, positive
from layers.norm import RMSNorm, l2_norm
from layers.ops.delta import delta_recurrence
from layers.ops.precision import wide
from layers.ops.recurrence import Implementation
from layers.recurrent import Maps, Recurrent


@dataclasses.dataclass(frozen=True)
class DeltaNet(LayerConfig):
    """H heads; K, V: key and value size of a head, None: D / H.

    negative_eigenvalues: β in (0, 2) instead of (0, 1), so that writing can flip what the memory holds at a key
        (arXiv 2411.12537). gate: an output gate, silu(W x), which the paper does without.
    conv: width of the short convolution on query, key and value; 0: none. SiLU follows either way.
    chunk, implementation: as in layers.ops.delta.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    negative_eigenvalues: bool = False
    gate: bool = False
    conv: int = 4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "chunk")
        check_taps(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "DeltaNetLayer":
        return DeltaNetLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(chunk=16), cls(H=2, K=12, V=20, negative_eigenvalues=True, gate=True, conv=0, chunk=8)


class DeltaNetState(NamedTuple):
    memory_BHKV: Array
    tails: Tails


class DeltaNetLayer(Recurrent):
    def __init__(self, config: DeltaNet, D: int, *, rngs: nnx.Rngs):
        K, V = head_size(config, "K", D), head_size(config, "V", D)
        self.config, self.K, self.V = config, K, V
        linear = partial(Einsum, D=D, H=config.H, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        self.written = Maps(key=linear("BTD,DHK->BTHK"), value=linear("BTD,DHV->BTHV"), beta=linear("BTD,DH->BTH"))
        self.convs = ShortConvs(
            "HK", "HK", "HV", taps=config.conv, activation=jax.nn.silu, H=config.H, K=K, V=V, rngs=rngs
        )
        self.gate = linear("BTD,DHV->BTHV") if config.gate else None
        self.norm = RMSNorm(V, axes="V")
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> DeltaNetState:
        return DeltaNetState(jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32), self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: DeltaNetState | None = None):
        c = self.config
        memory, tails = (None, None) if state is None else state
        beta = (1 + c.negative_eigenvalues) * jax.nn.sigmoid(written["beta"].astype(wide(q)))
        (q, k, v), tails = self.convs((q, written["key"], written["value"]), pos_BT, tails)
        y, new = delta_recurrence(
            l2_norm(q) * self.K**-0.5,
            l2_norm(k),
            v,
            beta,
            state=memory,
            pos=pos_BT,
            chunk=c.chunk,
            implementation=c.implementation,
        )
        state = None if memory is None else DeltaNetState(new.astype(memory.dtype), tails)
        return y, state, {"beta": jnp.mean(beta).astype(jnp.float32)}

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, None if self.gate is None else self.gate(x_BTD)))
