"""The gated short convolution: Zoology's BaseConv (Arora et al. 2023, arXiv 2312.04927), the first layer of its models.

It compares a token with the few before it and cannot recall. It gives a memory above it what that needs: at a value's
place, the key just before.
"""

import dataclasses
from typing import NamedTuple, Self

import jax
from flax import nnx
from jax import Array

from layers.conv import ShortConv
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, positive


@dataclasses.dataclass(frozen=True)
class GatedConv(LayerConfig):
    """y = conv(x) ∘ (x W + b) + x, with a causal convolution of its own for each channel, bias included.

    taps: the tokens that a convolution sees, itself included.
    F: None; or channels of the wider form that Based has in its language models (arXiv 2402.18668; twice D there):
        y = (silu(conv(x W_1 + b_1)) ∘ (x W_2 + b_2)) W_3 + b_3, the convolution without bias.

    W starts as N(0, 1/D) and the filters as U(±1/sqrt(taps)). The papers' models take N(0, 0.02²) for W, where the gate
    has to grow first; with unit-variance inputs ours is open from the start.
    """

    taps: int = 3
    F: int | None = None

    def __post_init__(self):
        positive(self, "F")
        if self.taps < 2:
            raise ValueError(f"GatedConv.taps is {self.taps}: it must be at least 2, or no token sees another")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "GatedConvLayer":
        return GatedConvLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(taps=5), cls(F=24)


class GatedConvState(NamedTuple):
    """tail_BJD: float32, the last taps - 1 inputs of the convolution, of width D or F."""

    tail_BJD: Array


class GatedConvLayer(Layer):
    def __init__(self, config: GatedConv, D: int, *, rngs: nnx.Rngs):
        self.config, F = config, config.F
        self.into = None if F is None else Einsum("BTD,DF->BTF", D=D, F=F, bias=True, rngs=rngs)
        if F is None:
            self.conv = ShortConv("D", D=D, taps=config.taps, bias=True, rngs=rngs)
        else:
            self.conv = ShortConv("F", F=F, taps=config.taps, activation=jax.nn.silu, rngs=rngs)
        self.gate = Einsum("BTD,DF->BTF", D=D, F=F or D, bias=True, rngs=rngs)
        self.out = None if F is None else Einsum("BTF,FD->BTD", D=D, F=F, bias=True, residual=True, rngs=rngs)

    def init_state(self, B: int, T: int) -> GatedConvState:
        return GatedConvState(self.conv.init_tail(B))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: GatedConvState | None = None) -> Out:
        told = x_BTD if self.into is None else self.into(x_BTD)
        mixed, tail = self.conv(told, tokens.pos_BT, None if state is None else state.tail_BJD)
        y = mixed * self.gate(x_BTD)
        y_BTD = y + x_BTD if self.out is None else self.out(y)
        return Out(y_BTD, None if state is None else GatedConvState(tail))
