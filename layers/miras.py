"""Miras' three models (Behrouz et al. 2025, arXiv 2504.13173, section 5): other losses and retentions than Titans'.

All: M(x) = x + LayerNorm(W_2 gelu(W_1 x)), plain gradient steps, gates for each output channel through a low rank.
"""

import dataclasses
from typing import Literal, Self

from layers.test_time import TestTimeMemory


@dataclasses.dataclass(frozen=True)
class Moneta(TestTimeMemory):
    """Loss |M(k) - v|_p^p with p = 3, weights A / |A|_q^(q-2) with q = 4 (equations 24 and 25).

    As printed the map is of degree 3 - q: what grows in A shrinks in W. `retention="lq_mirror"` is the map that its
    derivation gives, of degree 1.
    """

    loss: Literal["l2", "dot", "huber_norm", "huber_coord", "huber_mix", "lp"] = "lp"
    retention: Literal["decay", "kl", "bounded", "lq_printed", "lq_mirror", "elastic"] = "lq_printed"
    momentum: bool = False
    gates: Literal["matrix", "head", "output"] = "output"

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=12, chunk=4, rank=4),)


@dataclasses.dataclass(frozen=True)
class Yaad(TestTimeMemory):
    """Huber's loss: no step is longer than a threshold that the token says (equation 15; `huber_mix` is 26)."""

    loss: Literal["l2", "dot", "huber_norm", "huber_coord", "huber_mix", "lp"] = "huber_norm"
    momentum: bool = False
    gates: Literal["matrix", "head", "output"] = "output"

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=12, chunk=4, rank=4),)


@dataclasses.dataclass(frozen=True)
class Memora(TestTimeMemory):
    """Weights on a simplex: softmax over the inputs of each output, from logits that fade (equation 27)."""

    retention: Literal["decay", "kl", "bounded", "lq_printed", "lq_mirror", "elastic"] = "kl"
    momentum: bool = False
    gates: Literal["matrix", "head", "output"] = "output"

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=12, chunk=4, rank=4),)
