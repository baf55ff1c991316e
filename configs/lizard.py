"""Lizard: linear attention that forgets, and a window with learned scalars, bytes of Python source; @8B is Llama's."""

from configs.titans_lmm import FSDP, laptop
from layers.lizard import Lizard
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import AdamW, Experiment, Schedule, Train

config = laptop(__doc__, Lizard(H=4, window=64), 935_876)

# The paper (arXiv 2507.09025) trains no model of its own: it converts Llama-3-8B, and this is that model's shape but
# for its 8 groups of keys and values, which the layer does not have: each head has its own, 0.8B more. The settings are
# those of the second stage (20 million tokens, rows of 2,048), which follows the first, where the layer learns the
# answers of trained attention, and trains adapters alone. The conversion, and so the paper's figures, are not here.
TOKENS, T, B = 20_000_000, 2048, 8
sizes = {
    "8B": Experiment(
        description="Lizard, the shape of Llama-3-8B.",
        model=LM(
            W=128_256,
            D=4096,
            stages=(Stage((Lizard(H=32, window=128, rope_theta=500_000.0), MLP(F=14_336)), repeats=32),),
            norm_eps=1e-5,
            dtype="bfloat16",
            remat="block",
        ),
        data=Text(T=T, B=B, source="data/alpaca", tokenizer="data/llama-3/tokenizer.json"),
        optimizer=AdamW(lr=5e-4, schedule=Schedule(warmup=TOKENS // (10 * T * B), shape="cosine", final=0.1)),
        train=Train(steps=TOKENS // (T * B), eval_every=200, checkpoint_every=200),
        mesh=FSDP,
        parameters=8_852_480_032,
        pod="v5p:2x2x2",
    )
}
