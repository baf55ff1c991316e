"""Engram in the first and third of four blocks of Gated DeltaNet, bytes of Python source."""

import dataclasses

from configs.titans_lmm import laptop
from layers.engram import Engram
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from models.lm import Stage

BLOCK = (GatedDeltaNet(H=4), MLP())
LAYERS = (1, 3)  # of the blocks, from 0


def engram(layer: int) -> Engram:
    return Engram(layer=layer, layers=LAYERS, N=4, H=4, K=16, rows=1 << 13)


config = laptop(__doc__, BLOCK[0], 4_349_536)
config = dataclasses.replace(
    config,
    model=dataclasses.replace(
        config.model, stages=(Stage(BLOCK), Stage((engram(1), *BLOCK)), Stage(BLOCK), Stage((engram(3), *BLOCK)))
    ),
)
