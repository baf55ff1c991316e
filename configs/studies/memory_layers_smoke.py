"""A look at every part of a study in a minute: three memories on MQAR, two learning rates, matched in parameters."""

from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.gated_deltanet import GatedDeltaNet
from layers.linear import LinearAttention
from layers.mlp import MLP
from models.lm import LM, Stage
from probes.study import Claim, Match, Study, axis
from probes.tasks.recall import MQAR
from probes.tasks.task import probe
from training.experiment import AdamW, Experiment, Schedule, Train

LAW = MQAR(vocab=64, length=32, pairs=2, filler="conflict_free")
HARDER = MQAR(vocab=64, length=32, pairs=4, filler="conflict_free")
LAYERS = {
    "attention": Attention(H=2, rope_theta=None),
    "linear attention": LinearAttention(H=2),
    "gated delta rule": GatedDeltaNet(H=2),
}
smoke = Study(
    about="Which memory recalls pairs after a few steps, all models having as many parameters?",
    base=Experiment(
        description="MQAR, a gated convolution and a memory.",
        model=LM(W=64, D=32, stages=(Stage((GatedConv(), LAYERS["attention"], MLP(F=64))),), tied=True),
        data=probe([LAW], [LAW, HARDER], 128, B=64),
        optimizer=AdamW(lr=3e-2, schedule=Schedule(warmup=5, shape="cosine", final=0.0)),
        train=Train(steps=96),
    ),
    axes=(axis("memory", "model.stages.0.pattern.1", LAYERS),),
    rates=(1e-2, 3e-2),
    seeds=2,
    match=(Match("parameters", ("model.stages.0.pattern.2.F",), tuple(range(4, 97, 4))),),
    checks=8,
    versus="state_bytes",
    claims=(
        Claim(
            "Attention recalls more than a linear memory with as many parameters.",
            "Arora et al. 2023, arXiv 2312.04927, figure 2",
            more="attention",
            less="linear attention",
        ),
    ),
    notes="96 steps show that all parts work, and little of the memories.",
)
tiers = {"smoke": smoke}
