"""Memory as gate: attention over a window and a long-term memory side by side, one gating the other.

    y = attention(x)        o = norm(y) ∘ σ(norm(memory(x)))

(Titans, arXiv 2501.00663, section 4.2.) The paper leaves the gate open: "normalise both with learned vectors, then a
nonlinearity"; `combine` says which. On associative recall "sigmoid" learns in half the steps of "silu" as a gate; as
context it learns in two seeds of three what "silu" learns in none (results/probes).
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Self

import jax
from flax import nnx
from jax import Array

from layers.attention import Attention
from layers.layer import Layer, LayerConfig, Out, Tokens, one_of
from layers.norm import RMSNorm
from layers.titans import Titans

How = Literal["sigmoid", "silu", "convex"]


class Combine(nnx.Module):
    """norm(y) ∘ σ(norm(m)) of two streams of width D; "convex": σ norm(y) + (1 - σ) norm(m), with σ of norm(m)."""

    def __init__(self, how: How, D: int):
        self.how = how
        self.norm_y, self.norm_m = RMSNorm(D), RMSNorm(D)

    def __call__(self, y_BTD: Array, m_BTD: Array) -> Array:
        y, m = self.norm_y(y_BTD), self.norm_m(m_BTD)
        if self.how == "silu":
            return y * jax.nn.silu(m)
        share = jax.nn.sigmoid(m)
        return y * share if self.how == "sigmoid" else share * y + (1 - share) * m


@dataclasses.dataclass(frozen=True)
class MemoryAsGate(LayerConfig):
    """attention and memory: layers, each with its own projections and, where the paper shares them, persistent tokens.

    combine: what of the memory's answer multiplies: "sigmoid", "silu", or "convex", which mixes both.
    """

    attention: Attention = Attention(window=2048, persistent=128)
    memory: LayerConfig = Titans(persistent=128)
    combine: How = "sigmoid"

    def __post_init__(self):
        one_of(self)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MemoryAsGateLayer":
        return MemoryAsGateLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(Attention(H=2, window=6, persistent=2), Titans(H=2, K=8, depth=1, chunk=4)),)


class MemoryAsGateState(NamedTuple):
    attention: Any
    memory: Any


class MemoryAsGateLayer(Layer):
    def __init__(self, config: MemoryAsGate, D: int, *, rngs: nnx.Rngs):
        self.attention, self.memory = config.attention.build(D, rngs=rngs), config.memory.build(D, rngs=rngs)
        self.combine = Combine(config.combine, D)

    def init_state(self, B: int, T: int) -> MemoryAsGateState:
        return MemoryAsGateState(self.attention.init_state(B, T), self.memory.init_state(B, T))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: MemoryAsGateState | None = None) -> Out:
        seen = self.attention(x_BTD, tokens, None if state is None else state.attention)
        held = self.memory(x_BTD, tokens, None if state is None else state.memory)
        new = None if state is None else MemoryAsGateState(seen.state, held.state)
        return Out(self.combine(seen.y_BTD, held.y_BTD), new, seen.aux | held.aux)
