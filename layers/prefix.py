"""Prefix linear attention, the memory of JRT-RNN (Arora et al. 2024, arXiv 2407.05483): a region is read ahead.

    y_i = φ(q_i)^T (sum_{j <= i} φ(k_j) v_j^T + sum_{j in region} φ(k^e_j) v^e_j^T)
        / φ(q_i)^T (sum_{j <= i} φ(k_j)       + sum_{j in region} φ(k^e_j))

Linear attention that begins with what an encoder, k^e and v^e, says of the region: every token, those of the region
too, knows what the region holds while it decides what to keep of it. The state is linear attention's, and so is all
that follows the region. Without one this is linear attention.
"""

import dataclasses
from functools import partial
from typing import Any, Self

from flax import nnx
from jax import Array

from layers.layer import Einsum, Out, Tokens
from layers.linear import FeatureMap, LinearAttention, LinearAttentionLayer
from layers.ops.prefix import prefix_recurrence
from layers.recurrent import Maps


@dataclasses.dataclass(frozen=True)
class PrefixLinearAttention(LinearAttention):
    """LinearAttention with an encoder's maps of key and value, no convolution, and the paper's feature map by default.

    It reads ahead where it is a layer of the model; inside another layer it is linear attention.
    """

    feature_map: FeatureMap = "taylor"

    def __post_init__(self):
        super().__post_init__()
        if self.conv:
            raise ValueError(
                f"PrefixLinearAttention.conv is {self.conv}: its encoder has no convolution, so leave it 0"
            )

    def build(self, D: int, *, rngs: nnx.Rngs) -> "PrefixLinearAttentionLayer":
        return PrefixLinearAttentionLayer(self, D, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(H=2, K=6, V=12, chunk=16),
            cls(H=4, feature_map="hedgehog", F=6, chunk=16),
            cls(H=4, feature_map="identity", normaliser=False, chunk=16),
        )


class PrefixLinearAttentionLayer(LinearAttentionLayer):
    def __init__(self, config: PrefixLinearAttention, D: int, *, rngs: nnx.Rngs):
        super().__init__(config, D, rngs=rngs)
        linear = partial(Einsum, D=D, H=config.H, K=self.K, V=self.V, rngs=rngs)
        self.ahead = Maps(key_ahead=linear("BTD,DHK->BTHK"), value_ahead=linear("BTD,DHV->BTHV"))

    def prefixed(self, x_BTD: Array, tokens: Tokens, prefix_BT: Array, state: Any = None) -> Out:
        written = self.written(x_BTD) | self.ahead(x_BTD) | {"prefix": prefix_BT}
        y, state, aux = self.run(self.query(x_BTD), written, tokens.pos_BT, state)
        return Out(self.finish(y, x_BTD), state, aux)

    def recur(self, q: Array, k: Array, v: Array, written: dict[str, Array], memory: Array | None, pos_BT: Array):
        if "prefix" not in written:
            return super().recur(q, k, v, written, memory, pos_BT)
        ahead = self.told(written["key_ahead"], written["value_ahead"])
        c = self.config
        return prefix_recurrence(
            *(q, k, v, *ahead, written["prefix"]),
            pos=pos_BT,
            state=memory,
            chunk=c.chunk,
            implementation=c.implementation,
        )
