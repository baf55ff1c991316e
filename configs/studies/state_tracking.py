"""What follows a state beyond the length it was trained at: eigenvalues down to -1, and those of 0 to 1."""

import dataclasses

from layers.attention import Attention
from layers.deltanet import DeltaNet
from layers.gated_deltanet import GatedDeltaNet
from layers.kda import KDA
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.mamba2 import Mamba2
from probes.study import Claim, Study, axis, of_experiments
from probes.tasks.task import discover
from probes.trial import experiment

LAYERS: dict[str, LayerConfig] = {
    "DeltaNet, -1 to 1": DeltaNet(negative_eigenvalues=True),
    "DeltaNet, 0 to 1": DeltaNet(),
    "Gated DeltaNet, -1 to 1": GatedDeltaNet(negative_eigenvalues=True),
    "Gated DeltaNet, 0 to 1": GatedDeltaNet(),
    "KDA, -1 to 1": KDA(negative_eigenvalues=True),
    "Mamba-2": Mamba2(),
    "linear attention": LinearAttention(),
    "attention": Attention(),
}
SOURCE = "Grazzi et al. 2024, arXiv 2411.12537"


def study(*names: str, layers: dict[str, LayerConfig] = LAYERS) -> Study:
    trials = discover()
    tasks = {name.partition("@")[0]: experiment(LAYERS["attention"], trials[name]) for name in names}
    base = next(iter(tasks.values()))
    return Study(
        about="Which layers follow a state, at lengths that they were not trained on?",
        base=base,
        axes=(of_experiments("task", tasks), axis("layer", "model.stages.0.pattern.0", layers)),
        versus="task",
        within="task",
    )


def claims(far: str) -> tuple[Claim, ...]:
    """far: the slice of the longest rows of parity."""

    def claim(says: str, task: str, more: str, less: str, slice: str, source: str = SOURCE) -> Claim:
        return Claim(says, source, f"{task}, {more}", f"{task}, {less}", least=0.2, slice=slice)

    return (
        claim(
            "With eigenvalues down to -1 DeltaNet solves parity beyond the training length, with 0 to 1 it does not.",
            "parity",
            "DeltaNet, -1 to 1",
            "DeltaNet, 0 to 1",
            far,
        ),
        claim("So does Gated DeltaNet.", "parity", "Gated DeltaNet, -1 to 1", "Gated DeltaNet, 0 to 1", far),
        claim(
            "Mamba-2, whose eigenvalues lie between 0 and 1, stays behind.",
            "parity",
            "DeltaNet, -1 to 1",
            "Mamba-2",
            far,
        ),
        claim("So does attention.", "parity", "DeltaNet, -1 to 1", "attention", far),
    )


def others(far: str) -> tuple[Claim, ...]:
    """Of states that are more than a sign; the sources have more than one layer."""
    sums = f"{SOURCE}: modular arithmetic without brackets, 0.31 to 0.97 of what is above chance"
    said = (
        ("mod5", "Negative eigenvalues help with sums modulo 5.", sums),
        ("s3", "And with products of permutations.", f"{SOURCE}: products of reflections"),
    )
    return tuple(
        Claim(says, source, f"{task}, DeltaNet, -1 to 1", f"{task}, DeltaNet, 0 to 1", least=0.1, slice=far)
        for task, says, source in said
    )


_few = {name: LAYERS[name] for name in ("DeltaNet, -1 to 1", "DeltaNet, 0 to 1", "Mamba-2")}
tiers = {
    "smoke": dataclasses.replace(study("parity@smoke", layers=_few), seeds=1, checks=4),
    "laptop": dataclasses.replace(
        study("parity", "mod5", "s3"),
        claims=claims("length 320") + others("length 320"),
        notes="Parity, sums modulo 5 and products in S3 (the permutations of three things), trained at 40 tokens and "
        "asked up to 320; one layer and an MLP. A product of two reflections, which S3's rotations take, needs two "
        "steps of a delta rule a token: one layer that writes once has one.",
    ),
    "paper": dataclasses.replace(
        study("parity@paper", "a5@paper", "s5@paper"),
        rates=(1e-3, 3e-3),
        claims=claims("length 256, shortest 40"),
    ),
}
