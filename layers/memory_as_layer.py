"""Memory as layer: attention over a window of what a long-term memory answered.

    y = memory(x)        o = attention(norm(y))

(Titans, arXiv 2501.00663, section 4.3, whose figure has nothing between the two; the norm is ours, as before any layer
of a model.) To have the residual stream go around each, write (Titans(), Attention(window=...)) in a model's pattern.
"""

import dataclasses
from typing import Any, NamedTuple, Self

from flax import nnx
from jax import Array

from layers.attention import Attention
from layers.layer import Layer, LayerConfig, Out, Tokens
from layers.norm import RMSNorm
from layers.titans import Titans


@dataclasses.dataclass(frozen=True)
class MemoryAsLayer(LayerConfig):
    """memory and attention: layers, each with its own projections and, where the paper shares them, persistent ones."""

    memory: LayerConfig = Titans(persistent=128)
    attention: Attention = Attention(window=2048, persistent=128)

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MemoryAsLayerLayer":
        return MemoryAsLayerLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(Titans(H=2, K=8, depth=1, chunk=4), Attention(H=2, window=6)),)


class MemoryAsLayerState(NamedTuple):
    memory: Any
    attention: Any


class MemoryAsLayerLayer(Layer):
    def __init__(self, config: MemoryAsLayer, D: int, *, rngs: nnx.Rngs):
        self.memory, self.attention = config.memory.build(D, rngs=rngs), config.attention.build(D, rngs=rngs)
        self.norm = RMSNorm(D)

    def init_state(self, B: int, T: int) -> MemoryAsLayerState:
        return MemoryAsLayerState(self.memory.init_state(B, T), self.attention.init_state(B, T))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: MemoryAsLayerState | None = None) -> Out:
        held = self.memory(x_BTD, tokens, None if state is None else state.memory)
        seen = self.attention(self.norm(held.y_BTD), tokens, None if state is None else state.attention)
        new = None if state is None else MemoryAsLayerState(held.state, seen.state)
        return Out(seen.y_BTD, new, held.aux | seen.aux)

    def read(self, x_BTD: Array, tokens: Tokens, at_BN: Array) -> Out:
        held = self.memory(x_BTD, tokens)
        seen = self.attention.read(self.norm(held.y_BTD), tokens, at_BN)
        return seen._replace(aux=held.aux | seen.aux)
