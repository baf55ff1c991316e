"""A mixture of memories: how many, how many for a token, one shared or not, against one memory of equal state."""

import dataclasses

from layers.gated_conv import GatedConv
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from layers.mixture import MixtureOfMemories
from models.lm import LM, Stage
from probes.study import Claim, Study, axis
from probes.tasks.recall import parts
from probes.tasks.task import Probe
from training.experiment import AdamW, Experiment, Schedule, Train

EQUAL = "one of four's state"
SOURCE = "MoM (Du et al. 2025, arXiv 2502.13685), tables 2 and 5"


def memories(K: int, counts: tuple[int, ...]) -> dict[str, LayerConfig]:
    """Mixtures of so many memories of K by K for each head; and one memory of the state of four."""
    small = GatedDeltaNet(H=2, K=K, V=K)
    found: dict[str, LayerConfig] = {
        "one small": small,
        EQUAL: GatedDeltaNet(H=2, K=2 * K, V=2 * K + 8),  # of four with the tails of their convolutions
    }
    for M in counts:
        found[f"{M}, 1 a token"] = MixtureOfMemories(small, M=M, top=1, shared=False, balance=1e-2)
        found[f"{M}, 2 a token"] = MixtureOfMemories(small, M=M, top=2, shared=False, balance=1e-2)
    M = counts[0]
    found[f"{M}, 2 a token, 1 shared"] = MixtureOfMemories(small, M=M, top=2, balance=1e-2)
    found[f"{M}, 2 a token, one set of maps"] = MixtureOfMemories(
        small, M=M, top=2, shared=False, projections="one", balance=1e-2
    )
    found[f"{M}, 2 a token, no balance"] = MixtureOfMemories(small, M=M, top=2, shared=False, balance=0.0)
    return found


def study(W: int, T: int, pairs: tuple[int, ...], B: int, D: int, steps: int, mixers: dict[str, LayerConfig]) -> Study:
    def segments(rows: int):
        return parts(rows, *((T, n) for n in pairs), vocab=W, filler="conflict_free")

    return Study(
        about="Does a mixture of small memories recall more than one memory of the same state?",
        base=Experiment(
            description="MQAR, a gated convolution and memories.",
            model=LM(W=W, D=D, stages=(Stage((GatedConv(), mixers["one small"])),), tied=True),
            data=Probe(B=B, train=segments(20_000), test=segments(256)),
            optimizer=AdamW(lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0)),
            train=Train(steps=steps),
        ),
        axes=(axis("memory", "model.stages.0.pattern.1", mixers),),
        versus="state_bytes",
    )


CLAIMS = (
    Claim("A mixture recalls more than one of its memories.", SOURCE, "4, 2 a token", "one small"),
    Claim("It recalls more than one memory of equal state.", SOURCE, "4, 2 a token", EQUAL),
    Claim("A shared memory helps (26.06 to 28.16).", SOURCE, "4, 2 a token, 1 shared", "4, 2 a token"),
    Claim("With it a mixture recalls more than one of equal state.", SOURCE, "4, 2 a token, 1 shared", EQUAL),
    Claim("More memories recall more, of as many for a token.", SOURCE, "8, 2 a token", "4, 2 a token"),
    Claim("Half of the memories for a token are better than a quarter.", SOURCE, "4, 2 a token", "4, 1 a token"),
    Claim("A loss that keeps memories equally used helps.", SOURCE, "4, 2 a token", "4, 2 a token, no balance"),
)
_small = memories(8, (4, 8))
tiers = {
    "smoke": dataclasses.replace(
        study(64, 32, (2, 4), 16, 32, 30, {name: memories(4, (4,))[name] for name in ("one small", "4, 2 a token")}),
        seeds=1,
        checks=3,
    ),
    "laptop": dataclasses.replace(
        study(128, 64, (2, 4, 8), 64, 64, 600, _small),
        claims=CLAIMS,
        notes="Recall alone, at one learning rate; the paper's tables are of language at 380M and 1.3B parameters. "
        "The state of four memories is matched within 1% by one whose heads are wider (4,928 bytes, and 4,880); eight "
        "have twice that, and a shared one a fifth more. The weight of the balance is 0.01; the paper's best is 0.001.",
    ),
    "paper": dataclasses.replace(
        study(8192, 256, (16, 32, 64), 256, 128, 20_000, memories(32, (4, 8))),
        rates=(1e-3, 3e-3, 1e-2),
        claims=CLAIMS,
    ),
}
