"""Five minutes on a laptop: gated delta rule and a small attention window, bytes of Python source."""

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import Experiment, Muon, Schedule, Train

config = Experiment(
    description="Five minutes on a laptop: gated delta rule and a small attention window, bytes of Python source.",
    model=LM(
        W=257,
        D=192,
        stages=(Stage((GatedDeltaNet(H=3, K=32, V=64), MLP(), Attention(H=3, window=64), MLP()), repeats=2),),
    ),
    data=Text(T=256, B=16),
    optimizer=Muon(lr=5e-3, schedule=Schedule(warmup=50, shape="wsd", final=0.0, decay=0.4)),
    train=Train(steps=220, log_every=10, eval_every=55, checkpoint_every=55),
    parameters=1_875_404,
    sample="import os\n\ndef ",
)
