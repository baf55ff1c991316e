"""Associative recall (MQAR), 4 pairs in 64 tokens: a gated convolution, then attention."""

from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from models.lm import LM, Stage
from probes.tasks.recall import MQAR
from probes.tasks.task import Part, Probe
from training.experiment import AdamW, Experiment, Schedule, Train

LAW = MQAR(vocab=256, length=64, pairs=4, filler="conflict_free")


def experiment(name: str, mixer: LayerConfig, parameters: int) -> Experiment:
    """Zoology's small setting with any mixer: vocabulary 256, width 64, two layers, no MLP, 79 steps an epoch."""
    return Experiment(
        description=f"Associative recall (MQAR), 4 pairs in 64 tokens: a gated convolution, then {name}.",
        model=LM(W=256, D=64, stages=(Stage((GatedConv(), mixer)),), tied=True),
        data=Probe(B=256, train=(Part(LAW, 20_000),), test=(Part(LAW, 1_024),)),
        optimizer=AdamW(lr=1e-2, schedule=Schedule(warmup=0, shape="constant")),
        train=Train(steps=316, log_every=10, eval_every=79, checkpoint_every=0, eval_batches=None),
        parameters=parameters,
    )


config = experiment("attention", Attention(H=1, rope_theta=None), 37_376)
