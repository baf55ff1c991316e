"""MAD's six tasks and six memories, at a size that a laptop bears; @paper has the published sizes."""

import dataclasses
from collections.abc import Mapping

from layers.attention import Attention
from layers.deltanet import DeltaNet
from layers.gated_deltanet import GatedDeltaNet
from layers.gla import GLA
from layers.mamba2 import Mamba2
from layers.titans import Titans
from probes.study import Claim, Reference, Study, axis, of_experiments
from probes.tasks.mad import sweep
from probes.tasks.task import Trial, discover
from probes.trial import experiment

LAYERS = {
    "attention": Attention(),
    "DeltaNet": DeltaNet(),
    "Gated DeltaNet": GatedDeltaNet(),
    "GLA": GLA(),
    "Mamba-2": Mamba2(),
    "Titans": Titans(H=4, chunk=4, momentum_max=0.5),
}
TASKS = {
    "recall": "mad_recall",
    "noisy recall": "mad_noisy",
    "fuzzy recall": "mad_fuzzy",
    "copying": "mad_copy",
    "compression": "mad_compress",
    "memorising": "mad_memorize",
}
SOURCE = "MAD (Poli et al. 2024, arXiv 2403.17844), as the DeltaNet paper has it"
# Percent over the settings of each task: compression, fuzzy, in-context, memorising, noisy, selective copying.
PUBLISHED = {
    "attention": (51.6, 29.8, 94.1, 85.2, 86.8, 99.6),
    "GLA": (38.8, 6.9, 80.8, 63.3, 81.6, 88.6),
    "DeltaNet": (42.2, 35.7, 100.0, 52.8, 100.0, 100.0),
}
ORDER = ("compression", "fuzzy recall", "recall", "memorising", "noisy recall", "copying")


def study(trials: Mapping[str, Trial], layers: Mapping = LAYERS, place: int = 1) -> Study:
    """place: of the memory in a block; behind a convolution, unless the trials have none."""
    tasks = {said: experiment(LAYERS["attention"], trial) for said, trial in trials.items()}
    base = next(iter(tasks.values()))
    return Study(
        about="What do six memories learn of MAD's six tasks?",
        base=base,
        axes=(of_experiments("task", tasks), axis("memory", f"model.stages.0.pattern.{place}", layers)),
        versus="task",
        within="task",
        seeds=2,
    )


# What was trained on, among longer rows and more noise: MAD asks nothing else.
LEARNT = {
    "recall": "length 64",
    "noisy recall": "length 64, noise 0.2",
    "fuzzy recall": "length 64, shortest 1",
    "copying": "length 64, tokens 8",
    "compression": "length 32",
    "memorising": "length 32",
}


def claims(asked: Mapping[str, str]) -> tuple[Claim, ...]:
    """asked: the slice of each task; all of them where there is no other."""
    said = (
        ("DeltaNet recalls more than GLA.", "recall", "DeltaNet", "GLA"),
        ("It does so in noise.", "noisy recall", "DeltaNet", "GLA"),
        ("It does so where keys are fuzzy.", "fuzzy recall", "DeltaNet", "GLA"),
        ("It copies more.", "copying", "DeltaNet", "GLA"),
        ("GLA memorises more than DeltaNet.", "memorising", "GLA", "DeltaNet"),
        ("Attention memorises more than DeltaNet.", "memorising", "attention", "DeltaNet"),
        ("Attention compresses more than DeltaNet.", "compression", "attention", "DeltaNet"),
        ("In noise DeltaNet recalls more than attention.", "noisy recall", "DeltaNet", "attention"),
    )
    return tuple(
        Claim(says, SOURCE, f"{task}, {more}", f"{task}, {less}", slice=asked.get(task, ""))
        for says, task, more, less in said
    )


def references(asked: Mapping[str, str]) -> tuple[Reference, ...]:
    return tuple(
        Reference(f"{task}, {name}", percent / 100, slice=asked.get(task, ""))
        for name, percents in PUBLISHED.items()
        for task, percent in zip(ORDER, percents, strict=True)
    )


_all = discover()
_laptop = {said: dataclasses.replace(_all[name], steps=_all[name].steps // 2) for said, name in TASKS.items()}
_few = {name: LAYERS[name] for name in ("attention", "GLA")}
_look = {said: dataclasses.replace(_all[f"{TASKS[said]}@smoke"], steps=40) for said in ("recall", "copying")}
_published = sweep()
tiers = {
    "smoke": dataclasses.replace(study(_look, _few), seeds=1, checks=4),
    "laptop": dataclasses.replace(
        study(_laptop),
        claims=claims(LEARNT),
        references=references(LEARNT),
        notes="Published figures are means over five to fourteen settings of each task, of the best of six rates and "
        "decays, after 200 epochs, and balanced over answers; ours is one small setting, one rate, 500 to 1,000 steps, "
        "and the share of answers that are right. So the order of memories can be compared, and not the figures. "
        "Claims and the published figures are of rows like those trained on; accuracy is over longer rows too.",
    ),
    "paper": dataclasses.replace(
        study({said: _published[name] for said, name in TASKS.items()}, place=0),
        rates=(1e-4, 5e-4, 1e-3),
        weight_decays=(0.0, 0.1),
        claims=claims({}),
        references=references({}),
        notes="The first setting of each task, and not the 66 of the paper; every other by `probe.py`.",
    ),
}
