"""What share of a model's parameters should be in tables of n-grams, at a fixed total? Bits a byte of text."""

import dataclasses

from layers.engram import Engram
from layers.gated_deltanet import GatedDeltaNet
from layers.mlp import MLP
from models.lm import LM, Stage
from probes.study import Axis, Choice, Claim, Match, Study
from training.data import Text
from training.experiment import Experiment, Muon, Schedule, Train

SOURCE = "Engram (arXiv 2601.07372), section 3: the best share is 20 to 25% of what is sparse"
MATCH = ("model.stages.0.pattern.1.F", "model.stages.1.pattern.2.F", "model.stages.2.pattern.1.F")


def stages(F: int, blocks: int, engram: Engram | None) -> tuple[Stage, ...]:
    """Blocks of a gated delta rule and an MLP, an Engram before the second."""
    block = (GatedDeltaNet(H=4), MLP(F=F))
    return Stage(block), Stage(block if engram is None else (engram, *block)), Stage(block, blocks - 2)


def study(base: Experiment, F: int, blocks: int, engram: Engram, rows: dict[str, int], values: range) -> Study:
    """Tables of so many rows for each order and hash; what they take, the MLPs of width F give."""
    choices = [Choice("none", (("model.stages", stages(F, blocks, None)),))]
    for said, count in rows.items():
        table = dataclasses.replace(engram, rows=count)
        choices.append(Choice(said, (("model.stages", stages(F, blocks, table)),)))
    return Study(
        about="What share of a model's parameters should be in tables of n-grams, at a fixed total?",
        base=base,
        axes=(Axis("in tables", tuple(choices)),),
        match=(Match("parameters", MATCH, tuple(values)),),
        versus="in tables",
    )


def text(D: int, stages: tuple[Stage, ...], data: Text, W: int, steps: int, lr: float, **model) -> Experiment:
    return Experiment(
        description="Text, Gated DeltaNet and an Engram.",
        model=LM(W=W, D=D, stages=stages, **model),
        data=data,
        optimizer=Muon(lr=lr, schedule=Schedule(warmup=max(1, steps // 10), shape="wsd", final=0.0, decay=0.4)),
        train=Train(steps=steps),
    )


CLAIMS = (
    Claim("Tables are worth more than the MLPs that they replace.", SOURCE, "20%", "none", least=0.005),
    Claim("Too much in tables is worse than a fifth.", SOURCE, "20%", "45%", least=0.005),
    Claim("Too little is worse than a fifth.", SOURCE, "20%", "5%", least=0.005),
)
_bytes = Engram(W=257, N=4, H=2, K=16)
_words = Engram(W=32_000, N=3, H=8, K=64)
tiers = {
    "smoke": dataclasses.replace(
        study(
            text(32, stages(96, 3, None), Text(T=64, B=4), 257, 20, 5e-3),
            96, 3, dataclasses.replace(_bytes, K=4), {"20%": 400}, range(16, 97, 8),
        ),
        seeds=1,
        checks=2,
    ),
    "laptop": dataclasses.replace(
        study(
            text(96, stages(288, 3, None), Text(T=256, B=8), 257, 300, 5e-3),
            288, 3, _bytes, {"5%": 220, "10%": 470, "20%": 960, "30%": 1440, "45%": 2200}, range(8, 289, 8),
        ),
        claims=CLAIMS,
        notes="Bytes of Python source, half a million parameters, 600,000 bytes read: a dense model. The paper's law "
        "is of a mixture of experts at 5.7 and 9.9 billion, whose sparse parameters alone are divided. The text is "
        "that of the Python that runs it: under another version all arms are trained again.",
    ),
    "paper": dataclasses.replace(
        study(
            text(
                768,
                stages(2048, 12, None),
                Text(T=2048, B=128, source="data/fineweb-edu", tokenizer="data/llama-2/tokenizer.json"),
                32_000, 20_000, 2e-3, dtype="bfloat16", remat="block",
            ),
            2048, 12, _words, {"5%": 7_200, "10%": 14_500, "20%": 29_000, "30%": 43_400, "45%": 65_200},
            range(64, 2049, 64),
        ),
        seeds=2,
        claims=CLAIMS,
    ),
}  # fmt: skip
