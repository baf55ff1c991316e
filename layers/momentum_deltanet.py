"""Momentum DeltaNet (2026, arXiv 2605.05838): the gated delta rule whose steps have momentum.

    M_t = μ_t M_{t-1} - η_t k_t (α_t k_t^T S_{t-1} - v_t^T)
    S_t = α_t S_{t-1} + β_t M_t,  y_t = S_t^T q_t / sqrt(K)

η in (0, 2). What is written and what is kept share one angle: with θ = arctan(η exp(factor)), β ≤ sin² θ, α ≤ cos² θ.
Equations as in the authors' code; M here is minus theirs. Read exactly, in chunks of any size (ops/test_time.py).
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails, check_taps
from layers.decay import MambaDecay
from layers.heads import head_size
from layers.layer import Einsum, LayerConfig, one_of, positive
from layers.norm import RMSNorm, l2_norm
from layers.ops import fast_weights as fw
from layers.ops.precision import wide
from layers.ops.test_time import Gate, Implementation, Rule, State, test_time_memory
from layers.recurrent import Maps, Recurrent


@dataclasses.dataclass(frozen=True)
class MomentumDeltaNet(LayerConfig):
    """H heads with a memory and a momentum each, K by V; None: 3/4 · D / H and twice K.

    least_momentum: log μ is not below it. correction: the query is q - exp(d) k, d learned per head (as in Comba).
    gate: the output gate, σ(W x). conv: width of the short convolution on query, key and value; 0: none. SiLU follows
    either way. chunk: how the work is cut; it changes nothing. implementation: "naive" is the recurrence itself.

    At the start exp of A_log and of its like for μ is U(0.001, 16), exp(factor) U(0.001, 4), exp(d) U(0.001, 1): the
    authors' U(0, .), kept off 0, whose log is infinite.
    """

    H: int = 4
    K: int | None = None
    V: int | None = None
    least_momentum: float = -2.0
    correction: bool = True
    gate: bool = True
    conv: int = 4
    chunk: int = 64
    implementation: Implementation = "auto"

    def __post_init__(self):
        positive(self, "H", "K", "V", "chunk")
        one_of(self)
        check_taps(self)
        if self.least_momentum > 0:
            raise ValueError(f"MomentumDeltaNet.least_momentum is {self.least_momentum}: a log, it must be at most 0")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MomentumDeltaNetLayer":
        return MomentumDeltaNetLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, V=12, chunk=16),)


class MomentumDeltaNetState(NamedTuple):
    memory_BHKV: Array
    momentum_BHKV: Array
    tails: Tails


class MomentumDeltaNetLayer(Recurrent):
    def __init__(self, config: MomentumDeltaNet, D: int, *, rngs: nnx.Rngs):
        H, K = config.H, head_size(config, "K", D, Fraction(3, 4))
        V = config.V or 2 * K
        self.config, self.D, self.K, self.V = config, D, K, V
        linear = functools.partial(Einsum, D=D, H=H, K=K, V=V, rngs=rngs)
        self.query = linear("BTD,DHK->BTHK")
        key, value = linear("BTD,DHK->BTHK"), linear("BTD,DHV->BTHV")
        self.convs = ShortConvs("HK", "HK", "HV", taps=config.conv, activation=jax.nn.silu, H=H, K=K, V=V, rngs=rngs)
        gates = {name: linear("BTD,DH->BTH") for name in ("beta", "step", "hold", "push")}
        self.written = Maps(key=key, value=value, **gates)
        self.decay = MambaDecay("H", A=(1e-3, 16.0), H=H, rngs=rngs)
        self.momentum = MambaDecay("H", A=(1e-3, 16.0), H=H, rngs=rngs)
        log_uniform = lambda most: jnp.log(jax.random.uniform(rngs.params(), [H], jnp.float32, 1e-3, most))  # noqa: E731
        self.factor = nnx.Param(log_uniform(4.0), axes="H", decay=False)
        self.correct = nnx.Param(log_uniform(1.0), axes="H", decay=False) if config.correction else None
        self.gate = linear("BTD,DHV->BTHV") if config.gate else None
        self.norm = RMSNorm(V, axes="V", activation=jax.nn.sigmoid)
        self.out = linear("BTHV,HVD->BTD", residual=True)

    def init_state(self, B: int, T: int) -> MomentumDeltaNetState:
        zeros = jnp.zeros((B, self.config.H, self.K, self.V), jnp.float32)
        return MomentumDeltaNetState(zeros, zeros, self.convs.init_tails(B))

    def run(self, q: Array, written: dict[str, Array], pos_BT: Array, state: MomentumDeltaNetState | None = None):
        c, dtype = self.config, wide(q)
        memory = None if state is None else State({"w0": state.memory_BHKV}, {"w0": state.momentum_BHKV}, None)
        streams = q, written["key"], written["value"]
        (q, k, v), tails = self.convs(streams, pos_BT, None if state is None else state.tails)
        if self.correct is not None:
            q = q - jnp.exp(self.correct[...]).astype(q.dtype)[None, None, :, None] * k
        gate, aux = self._gates(written, dtype)
        zeros = {"w0": jnp.zeros((c.H, self.K, self.V), dtype)}
        y, after = test_time_memory(
            Rule(fw.network("mlp", 1), fw.l2, chunk=c.chunk, exact="l2", decayed=True),
            l2_norm(q) * self.K**-0.5,
            l2_norm(k),
            v,
            {"w0": gate},
            (zeros, None),
            state=memory,
            pos=pos_BT,
            implementation=c.implementation,
            wanted=state is not None,
        )
        if after is not None and after.momentum is not None:
            state = MomentumDeltaNetState(after.weights["w0"], after.momentum["w0"], tails)
        return y, state, aux

    def finish(self, y_BTHV: Array, x_BTD: Array) -> Array:
        return self.out(self.norm(y_BTHV, None if self.gate is None else self.gate(x_BTD)))

    def _gates(self, written: dict[str, Array], dtype: jnp.dtype) -> tuple[Gate, dict[str, Array]]:
        log_keep, _ = self.decay(written["step"])
        log_momentum, _ = self.momentum(written["hold"])
        log_momentum = jnp.maximum(log_momentum, self.config.least_momentum)
        lr = 1 + jnp.tanh(written["push"].astype(dtype) / math.sqrt(self.D))
        ratio = lr * jnp.exp(self.factor[...].astype(dtype))[None, None]  # tan θ
        log_keep = log_keep - jnp.log1p(jnp.square(ratio))  # cos² θ = 1 / (1 + tan² θ)
        beta = jax.nn.sigmoid(written["beta"].astype(dtype)) * jnp.square(ratio) / (1 + jnp.square(ratio))
        said = {"beta": beta, "keep": jnp.exp(log_keep), "momentum": jnp.exp(log_momentum), "lr": lr}
        gate = Gate(*(a[..., None] for a in (lr, log_keep, log_momentum, beta)))
        return gate, {name: jnp.mean(a).astype(jnp.float32) for name, a in said.items()}
