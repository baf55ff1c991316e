"""A language model that must say a whole row from one vector: the one it has when it has read the row.

    h = hidden at the row's last token ;  for place t: logits_t = head(W_2 gelu(W_1 (h + sincos(t))))

MAD's compression task (Poli et al. 2024, arXiv 2403.17844) asks that of a model. It is no language model by the house's
laws, since what is said of a place depends on later ones: it is trained and asked, and never decoded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from layers.layer import Einsum, Out, Tokens
from models.lm import LM, LanguageModel, Skip
from probes.tasks.task import Probe
from training.data import DataConfig


@dataclasses.dataclass(frozen=True)
class Bottleneck(LM):
    """An LM whose labels are answered from its last hidden vector."""

    def build(self, *, rngs: nnx.Rngs) -> "BottleneckModel":
        return BottleneckModel(self, rngs=rngs)


def for_task(model: LM, data: DataConfig) -> LM:
    """The model that data asks for: with a bottleneck where its tasks have one."""
    asks = isinstance(data, Probe) and data.train[0].task.bottleneck
    return Bottleneck(**vars(model)) if asks and not isinstance(model, Bottleneck) else model


class BottleneckModel(LanguageModel):
    def __init__(self, config: LM, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        D, F = config.D, 4 * config.D
        self.up = Einsum("BTD,DF->BTF", D=D, F=F, rngs=rngs)
        self.down = Einsum("BTF,FD->BTD", D=D, F=F, rngs=rngs)

    def hidden(
        self,
        tokens: Tokens,
        state: Any = None,
        *,
        skip: Skip = (),
        at_BN: Array | None = None,
        prefix_BT: Array | None = None,
    ) -> Out:
        """[B, T, D], or [B, N, D] for the places at_BN. ValueError with a state."""
        if state is not None:
            raise ValueError("BottleneckModel.hidden: a row is read whole, so it has no state")
        place_T = jnp.arange(tokens.pos_BT.shape[1])
        last_B1 = jnp.max(jnp.where(tokens.pos_BT >= 0, place_T, 0), 1, keepdims=True)
        out = super().hidden(tokens, skip=skip, at_BN=last_B1, prefix_BT=prefix_BT)
        place_BN = jnp.broadcast_to(place_T, tokens.pos_BT.shape) if at_BN is None else at_BN
        z_BND = out.y_BTD + sincos(place_BN, out.y_BTD.shape[-1]).astype(out.y_BTD.dtype)
        return out._replace(y_BTD=self.down(jax.nn.gelu(self.up(z_BND))))


def sincos(place_BN: Array, D: int) -> Array:
    """Sines and cosines of places, [B, N, D] (Vaswani et al. 2017, section 3.5)."""
    rate = 10_000.0 ** (-jnp.arange(0, D, 2, dtype=jnp.float32) / D)
    angle = jnp.einsum("BN,D->BND", place_BN.astype(jnp.float32), rate)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[..., :D]
