"""Moneta, Yaad and Memora (Behrouz et al. 2025, "It's All Connected", arXiv 2504.13173, section 5).

Three points of one frame: a memory x + LayerNorm(W_2 gelu(W_1 x)), plain descent, a keep and a learning rate for each
channel. They differ in the loss that is descended and in what is retained.

    Moneta   |M(k) - v|_p^p              A_t = keep A_{t-1} - lr ∇,  W = A with its q-norm held
    Yaad     Huber, threshold by token   W_t = keep W_{t-1} - lr ∇
    Memora   |M(k) - v|² / 2             W = softmax of A over the inputs of each unit
"""

import dataclasses
from typing import Self

from layers.test_time import Gates, Loss, Retention, TestTimeMemory


@dataclasses.dataclass(frozen=True)
class _ByChannel:
    """What the three share."""

    momentum: bool = False
    gates: Gates = "output"

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=6, rank=4, chunk=4, conv=0),)  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class Moneta(_ByChannel, TestTimeMemory):
    """p = 3, q = 4. error_max None is the loss as printed, whatever the error.

    retention "lq_printed" is the map as the paper prints it, under which weights shrink as A grows. The default,
    "lq_mirror", is the map that the paper's own derivation gives.
    """

    loss: Loss = "lp"
    retention: Retention = "lq_mirror"

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        usual = super().examples()
        return (*usual, dataclasses.replace(usual[0], retention="lq_printed"))


@dataclasses.dataclass(frozen=True)
class Yaad(_ByChannel, TestTimeMemory):
    """loss "huber_norm" bounds each token's gradient; "huber_mix" is eq. 26 itself, which jumps at its threshold."""

    loss: Loss = "huber_norm"


@dataclasses.dataclass(frozen=True)
class Memora(_ByChannel, TestTimeMemory):
    """`scale` is what the weights into each unit add up to. They are positive; norm and signed keys make up for it."""

    retention: Retention = "kl"
