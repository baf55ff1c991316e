"""The feed-forward layer: SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6)."""

import dataclasses
from typing import Self

import jax
from flax import nnx
from jax import Array

from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, positive


@dataclasses.dataclass(frozen=True)
class MLP(LayerConfig):
    """y = (silu(x W_gate) ∘ x W_up) W_down, no biases.

    F: hidden width; None = 2/3 · 4 · D (as many parameters as a plain MLP of hidden width 4 D), rounded up to a
        multiple of 64: fine enough that small widths keep the ratio.
    """

    F: int | None = None

    def __post_init__(self):
        positive(self, "F")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "MLPLayer":
        return MLPLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(F=48)


class MLPLayer(Layer):
    pointwise = True

    def __init__(self, config: MLP, D: int, *, rngs: nnx.Rngs):
        F = config.F or -(-8 * D // (3 * 64)) * 64
        self.config = config
        self.gate = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.up = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.down = Einsum("BTF,FD->BTD", D=D, F=F, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> tuple[()]:
        return ()

    def __call__(self, x_BTD: Array, tokens: Tokens, state: tuple[()] | None = None) -> Out:
        return Out(self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)), state)
