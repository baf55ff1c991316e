"""Engram in two of four blocks of Gated DeltaNet, bytes of Python source; @9.6B and @22B have the paper's tables."""

import dataclasses

from configs.titans_lmm import FSDP, laptop
from layers.attention import Attention
from layers.engram import Engram
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import Experiment, Muon, Schedule, Train

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

# The tables of Engram-27B and Engram-40B (arXiv 2601.07372): n-grams of 2 and 3, 8 hashes of each, rows of 80 numbers,
# before the second and fifteenth of 30 blocks of width 2,560, in each of four residual streams (mHC); 5.8B and 18.5B
# parameters. Around them the paper has a mixture of experts with latent attention, and this house has neither. Here
# stands a dense Transformer of as many parameters as that activates for a token, 3.8B: hence the names, which are not
# the paper's. Ids are hashed as they are: Engram.canonical wants a file, made of the tokenizer by
# layers.ops.ngram.canonical.
DENSE = (Attention(H=20), MLP(F=10_112))


def tables(size: str, rows: int, parameters: int) -> Experiment:
    """Rows of 4,096, 1,280 a step in five parts, 50,000 steps of Muon; the paper's rate falls in steps, not at hand."""
    table = Engram(W=129_280, layer=1, layers=(1, 14), N=3, H=8, K=80, rows=rows, streams=4)
    first, second = table, dataclasses.replace(table, layer=14)
    stages = (
        Stage(DENSE),
        Stage((first, *DENSE)),
        Stage(DENSE, 12),
        Stage((second, *DENSE)),
        Stage(DENSE, 15),
    )
    return Experiment(
        description=f"Engram, {size}.",
        model=LM(W=129_280, D=2560, stages=stages, dtype="bfloat16", remat="block", streams=4),
        data=Text(T=4096, B=1280, source="data/fineweb-edu", tokenizer="data/deepseek-v3/tokenizer.json"),
        optimizer=Muon(lr=4e-4, schedule=Schedule(warmup=1000, shape="wsd", final=0.1, decay=0.2)),
        train=Train(steps=50_000, eval_every=1000, checkpoint_every=1000, accumulate=5),
        mesh=FSDP,
        parameters=parameters,
        pod="v5p:4x4x8",
    )


sizes = {"9.6B": tables("9.6B", 2_262_400, 9_618_333_780), "22B": tables("22B", 7_239_680, 22_360_313_940)}
