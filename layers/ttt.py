"""TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv 2407.04620): a layer whose hidden state is a model that is trained.

    f(x) = x + LayerNorm(x W + b), or with a network of two matrices        y_t = f(q_t; W_t)
    W_t = W_chunk - sum_{i<=t} η_ti ∇|f(k_i) - v_i|² / 2
    η_ti = base · max(0, 1/t + offset_t) · σ(w x_i + b) / K

Gradients are taken where the chunk began (layers/ops/test_time.py); t counts within the chunk, so that each position is
near an average over its chunk. Nothing is forgotten but by the next document. In the authors' code the target is v - k
for a memory without its residual: the same gradient.
"""

import dataclasses
import functools
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.conv import ShortConvs, Tails
from layers.heads import even, head_size
from layers.layer import Einsum, Layer, LayerConfig, Out, Tokens, above_zero, one_of, positive
from layers.norm import LayerNorm
from layers.ops import fast_weights as fw
from layers.ops.precision import wide
from layers.ops.rope import rope
from layers.ops.test_time import Gate, Implementation, Rule, test_time_memory
from layers.test_time import TestTimeState, answer_norm, fresh


@dataclasses.dataclass(frozen=True)
class TTTLinear(LayerConfig):
    """H: heads, each with a matrix K by K and a bias. K: None = D / H.

    chunk: tokens of a step, 16 in the paper; it belongs to the model. base: of the learning rate (the authors raise it
    to 0.1 for the MLP, over the first steps of training).
    backbone: "mamba": query and key from one projection, each with a short convolution, and a gate on the output;
        "transformer": three projections and neither.
    rope_theta: of the places within a chunk; None: no position.
    implementation: as in layers.ops.test_time.
    """

    H: int = 4
    K: int | None = None
    chunk: int = 16
    base: float = 1.0
    backbone: Literal["mamba", "transformer"] = "mamba"
    rope_theta: float | None = 10_000.0
    implementation: Implementation = "auto"
    depth: ClassVar[int] = 1  # matrices

    def __post_init__(self):
        positive(self, "H", "K", "chunk", "rope_theta")
        one_of(self)
        above_zero(self, "base")

    def build(self, D: int, *, rngs: nnx.Rngs) -> "TTTLayer":
        return TTTLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, chunk=4),)


@dataclasses.dataclass(frozen=True)
class TTTMLP(TTTLinear):
    """As TTTLinear, with two matrices and GELU between. F: hidden width; None = 4 K."""

    F: int | None = None
    base: float = 0.1
    depth: ClassVar[int] = 2

    def __post_init__(self):
        super().__post_init__()
        positive(self, "F")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=6, chunk=4, backbone="transformer"),)


class TTTLayer(Layer):
    def __init__(self, config: TTTLinear, D: int, *, rngs: nnx.Rngs):
        c, H, K, depth = config, config.H, head_size(config, "K", D), config.depth
        F = config.F if isinstance(config, TTTMLP) else None
        if c.rope_theta is not None:
            even(c, K)
        self.config, self.K = config, K
        mamba = c.backbone == "mamba"
        linear = functools.partial(Einsum, D=D, H=H, K=K, V=K, rngs=rngs)
        self.key = linear("BTD,DHK->BTHK")
        self.query = None if mamba else linear("BTD,DHK->BTHK")
        self.value = linear("BTD,DHV->BTHV")
        self.convs = ShortConvs("HK", "HK", taps=4 if mamba else 0, H=H, K=K, rngs=rngs)
        self.lr = linear("BTD,DH->BTH", bias=True)
        self.offset = nnx.Param(jnp.zeros([c.chunk], jnp.float32), axes="C", decay=False)
        sizes = fw.sizes("mlp", K, K, F or 4 * K, depth, bias=True)
        self.start = nnx.Dict(
            {
                f"w{i}": nnx.Param(
                    # N(0, 0.02), and biases, the last row, zeros.
                    (0.02 * jax.random.normal(rngs.params(), [H, a, b], jnp.float32)).at[:, -1].set(0.0),
                    axes=f"H{'F' if i else 'K'}{'V' if i == depth - 1 else 'F'}",
                    decay=False,
                )
                for i, (a, b) in enumerate(sizes.values())
            }
        )
        self.outer = answer_norm(H, K)
        self.gate = linear("BTD,DHV->BTHV") if mamba else None
        self.norm = LayerNorm("HV", H=H, V=K)
        self.out = linear("BTHV,HVD->BTD", residual=True)
        self.rule = Rule(fw.network("mlp", depth, bias=True), fw.l2, chunk=c.chunk, average=True)

    def init_state(self, B: int, T: int) -> TestTimeState:
        """The memory with which a document starts; `momentum` holds the sum of the chunk's steps."""
        start = {name: w[...] for name, w in self.start.items()}
        return fresh(self.rule, (start, None), B, self.convs.init_tails(B))

    def __call__(self, x_BTD: Array, tokens: Tokens, state: TestTimeState | None = None) -> Out:
        c, pos, dtype = self.config, tokens.pos_BT, wide(x_BTD)
        k = self.key(x_BTD)
        q = k if self.query is None else self.query(x_BTD)
        tails: Tails = ()
        if self.convs.convs:
            (q, k), tails = self.convs((q, k), pos, None if state is None else state.tails)
        if c.rope_theta is not None:
            place_BT = jnp.where(pos >= 0, pos % c.chunk, pos)
            q, k = rope(q, place_BT, c.rope_theta), rope(k, place_BT, c.rope_theta)
        lr = jax.nn.sigmoid(self.lr(x_BTD).astype(dtype)) / self.K
        row_C = c.base * jnp.maximum(1 / jnp.arange(1, c.chunk + 1, dtype=dtype) + self.offset[...].astype(dtype), 0)
        start, outer = ({n: p[...].astype(dtype) for n, p in group.items()} for group in (self.start, self.outer))
        y, after = test_time_memory(
            self.rule,
            q,
            k,
            self.value(x_BTD),
            {name: Gate(lr[..., None]) for name in start},
            (start, None),
            outer,
            row=jnp.broadcast_to(row_C, (c.H, c.chunk)),
            state=None if state is None else state.learner,
            pos=pos,
            implementation=c.implementation,
            wanted=state is not None,
        )
        y = self.norm(y)
        if self.gate is not None:
            y = y * jax.nn.gelu(self.gate(x_BTD))
        new = None if after is None else TestTimeState(after, tails)
        return Out(self.out(y), new, {"lr": jnp.mean(lr).astype(jnp.float32)})
