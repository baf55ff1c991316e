"""Chunk attention: how long a chunk, how many of them, and how wide a window beside; dances of long ago."""

import dataclasses

from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.gated_conv import GatedConv
from models.lm import LM, Stage
from probes.study import Axis, Choice, Claim, Study
from probes.tasks.dances import Dances
from probes.tasks.task import Part, Probe
from training.experiment import Experiment, Muon, Schedule, Train

PLACE = "model.stages.0.pattern.1"
SOURCE = "HCAM (Lampinen et al. 2021, arXiv 2105.14039), figures 3 and 5: ballet"
CHUNKS = ChunkAttention(H=1, chunk=8, top=4, window=8, position="none")


def data(names: int, dances: int, moves: int, shown: tuple[int, ...], asked: tuple[int, ...], B: int, W: int) -> Probe:
    def laws(delays: tuple[int, ...]) -> list[Dances]:
        return [Dances(vocab=W, names=names, dances=dances, moves=moves, delay=delay) for delay in delays]

    return Probe(B=B, train=tuple(map(Part, laws(shown))), test=tuple(Part(law, 128) for law in laws(asked)))


def study(data: Probe, W: int, D: int, steps: int, chunks: tuple[int, ...], tops: tuple[int, ...]) -> Study:
    """Chunks by how many of them; then what each is worth against the window alone and attention to everything."""
    choices = [
        Choice(
            f"{top} chunk{'s' * (top > 1)} of {chunk}",
            ((PLACE, dataclasses.replace(CHUNKS, chunk=chunk, top=top)),),
        )
        for chunk in chunks
        for top in tops
    ]
    others = {
        "window of 8": Attention(H=1, window=8, rope_theta=None),
        "window of 32": Attention(H=1, window=32, rope_theta=None),
        "4 chunks of 8, no window": dataclasses.replace(CHUNKS, window=None),
        "4 chunks of 8, window of 32": dataclasses.replace(CHUNKS, window=32),
        "4 dances": dataclasses.replace(CHUNKS, boundary=(0,)),
        "attention": Attention(H=1, rope_theta=None),
    }
    choices += [Choice(name, ((PLACE, layer),)) for name, layer in others.items()]
    return Study(
        about="How long must a chunk be, and how many, to recall dances seen long ago?",
        base=Experiment(
            description="Dances, a gated convolution and a memory.",
            model=LM(W=W, D=D, stages=(Stage((GatedConv(), CHUNKS)),), tied=True),
            data=data,
            optimizer=Muon(lr=3e-2, adam_lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0)),
            train=Train(steps=steps),
        ),
        axes=(Axis("memory", tuple(choices)),),
    )


def claims(delay: int) -> tuple[Claim, ...]:
    far = f"delay {delay}"
    return (
        Claim("Chunks recall over delays far beyond the window.", SOURCE, "4 chunks of 8", "window of 8", slice=far),
        Claim("They do without a window beside.", SOURCE, "4 chunks of 8, no window", "window of 32", slice=far),
        Claim(
            "A window four times as wide is worth less than they are.",
            SOURCE,
            "4 chunks of 8",
            "window of 32",
            slice=far,
        ),
        Claim("Chunks of a dance each recall more than a grid's.", SOURCE, "4 dances", "4 chunks of 8", slice=far),
        Claim("Four chunks recall more than one.", SOURCE, "4 chunks of 8", "1 chunk of 8", slice=far),
    )


tiers = {
    "smoke": dataclasses.replace(study(data(8, 2, 2, (1,), (1, 8), 16, 32), 32, 32, 20, (8,), (4,)), seeds=1, checks=2),
    "laptop": dataclasses.replace(
        study(data(16, 4, 3, (1, 4), (1, 4, 16, 64), 128, 64), 64, 64, 400, (4, 8, 16), (1, 2, 4)),
        claims=claims(64),
        notes="Four dances of three moves and one question, where the paper has eight dances of sixteen and an agent "
        "that is rewarded. Trained at delays of 1 and 4 tokens, asked up to 64.",
    ),
    "paper": dataclasses.replace(
        study(data(15, 8, 16, (16,), (16, 48), 128, 48), 48, 256, 20_000, (8, 16, 32), (1, 2, 4, 8)),
        rates=(1e-2, 3e-2),
        claims=claims(48),
    ),
}
