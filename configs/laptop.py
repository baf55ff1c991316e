"""An hour on a laptop: gated delta rule, KDA and attention windows, bytes of Python source."""

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.kda import KDA
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import Experiment, Muon, Schedule, Train

config = Experiment(
    description="An hour on a laptop: gated delta rule, KDA and attention windows, bytes of Python source.",
    model=LM(
        W=257,
        D=256,
        stages=(
            Stage(
                (
                    GatedDeltaNet(H=4, K=32, V=64),
                    MLP(),
                    KDA(H=4, K=32, V=64),
                    MLP(),
                    Attention(H=4, window=128),
                    MLP(),
                ),
                repeats=2,
            ),
        ),
    ),
    data=Text(T=512, B=8),
    optimizer=Muon(lr=4e-3, schedule=Schedule(warmup=100, shape="wsd", final=0.0, decay=0.4)),
    train=Train(steps=1000, log_every=10, eval_every=250, checkpoint_every=100),
    parameters=4_950_808,
    sample="import os\n\ndef ",
)
