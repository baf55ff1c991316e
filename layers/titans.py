"""Titans' long-term memory (Behrouz et al. 2024, arXiv 2501.00663, section 3): surprise with momentum and forgetting.

    S_t = η_t S_{t-1} - θ_t ∇ |M_{t-1}(k_t) - v_t|² / 2        M_t = (1 - α_t) M_{t-1} + S_t        y_t = M_t(q_t)

M(x) = x + LayerNorm(W_2 gelu(W_1 x)). The paper trains it by chunks of 16 tokens, all of a chunk's gradients taken at
its start; so do we, and `chunk=1` is the equation itself.
"""

import dataclasses
from typing import Self

from layers.test_time import TestTimeMemory


@dataclasses.dataclass(frozen=True)
class Titans(TestTimeMemory):
    """The paper's defaults: two matrices of expansion 4, momentum, forgetting, chunks of 16, a gate for each matrix."""

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(H=2, K=8, F=12, chunk=4),)
