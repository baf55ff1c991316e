"""Engram at two depths, a mixture of memories, chunk attention and a window, bytes of Python source."""

import dataclasses

from configs.engram import engram
from configs.titans_lmm import laptop
from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.mixture import MixtureOfMemories
from layers.mlp import MLP
from models.lm import Stage

MIXTURE = MixtureOfMemories(GatedDeltaNet(H=4))
FAR = ChunkAttention(H=4, chunk=16, top=4)  # reads nothing near: the window before it does


config = laptop(__doc__, MIXTURE, 4_730_608)
config = dataclasses.replace(
    config,
    model=dataclasses.replace(
        config.model,
        stages=(
            Stage((MIXTURE, MLP())),
            Stage((engram(1), Attention(H=4, window=32), FAR, MLP())),
            Stage((MIXTURE, MLP())),
            Stage((engram(3), Attention(H=4, window=32), FAR, MLP())),
        ),
    ),
)
