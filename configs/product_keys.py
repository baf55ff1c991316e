"""Memory+ in place of the second and the fourth MLP, bytes of Python source; @373M is the paper's, beside its table."""

import dataclasses

from configs.titans_lmm import FSDP, laptop
from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from layers.product_keys import ProductKeyMemory
from models.lm import LM, Stage
from training.data import Text
from training.experiment import AdamW, Experiment, Schedule, Train

# Within a thousandth of the parameters of configs/engram.py: one table for both blocks, where that one has its two.
BLOCK = (GatedDeltaNet(H=4), MLP())
MEMORY = ProductKeyMemory(H=4, K=32, keys=164, top=8, shared=True)

config = laptop(__doc__, BLOCK[0], 4_348_768)
config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, stages=(Stage((*BLOCK, BLOCK[0], MEMORY), repeats=2),))
)

# Memory+ (arXiv 2412.09764) as its public code has it: one table of 1,024² slots at blocks 4, 12 and 20 of 24, from 0;
# the values' learning rate is ten times that of the rest. The rows of a step are ours: the code says 8 a device.
PAPER = (Attention(H=16, rope_theta=500_000.0), MLP(F=2816))
sizes = {
    "373M": Experiment(
        description="Memory+ in place of three of 24 MLPs, 373M beside a table of 1,024² slots.",
        model=LM(
            W=32_000,
            D=1024,
            stages=(Stage((*PAPER * 4, PAPER[0], ProductKeyMemory(shared=True), *PAPER * 3), repeats=3),),
            dtype="bfloat16",
            remat="block",
        ),
        data=Text(T=4096, B=256, source="data/fineweb-edu", tokenizer="data/llama-2/tokenizer.json"),
        optimizer=AdamW(lr=1e-4, table_lr=10.0, schedule=Schedule(warmup=4000, shape="wsd", final=0.01, decay=1.0)),
        train=Train(steps=128_000, eval_every=1000, checkpoint_every=1000),
        mesh=FSDP,
        parameters=1_440_537_600,
        pod="v5p:4x4x4",
    )
}
