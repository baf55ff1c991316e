"""Recall beside bytes of state, every layer that mixes tokens at three widths: the figure of Based and Zoology."""

import dataclasses

from layers.attention import Attention
from layers.layer import LayerConfig
from probes.asking import memories
from probes.study import Claim, Reference, Study, axis
from probes.tasks.recall import BASED, MQAR
from probes.tasks.task import Task, Trial, probe
from probes.trial import experiment

LAW = MQAR(vocab=256, length=64, pairs=4, filler="conflict_free")
# Materialised, token by token, they take half an hour of a core each: of the paper tier alone.
SLOW = ("Moneta", "Memora")
SAME = ("TestTimeMemory",)  # by its defaults it is Titans
# As read off the figure of Zoology's repository: vocabulary 8,192, a mixture of up to 64 pairs, asked up to 256.
PUBLISHED = {
    "attention": ((524_288, 1.000), (1_050_000, 1.000)),
    "sliding window": ((9_700, 0.081), (17_900, 0.145), (34_000, 0.310), (67_000, 0.514), (132_000, 0.655)),
    "DeltaNet": ((8_900, 0.793), (34_100, 0.963), (134_000, 0.994)),
    "Gated DeltaNet": ((17_100, 0.890), (66_800, 0.988), (263_000, 0.993)),
    "GLA": ((4_900, 0.532), (17_900, 0.771), (68_400, 0.950)),
    "Based": ((9_400, 0.667), (12_400, 0.719), (24_700, 0.840), (40_400, 0.912), (79_000, 0.987)),
    "Mamba-2": ((8_200, 0.520), (16_300, 0.690), (24_500, 0.727), (32_600, 0.784), (65_300, 0.832)),
}
REFERENCES = tuple(
    Reference(f"{name}, published", value, size) for name, points in PUBLISHED.items() for size, value in points
)


def law(length: int, pairs: int) -> Task:
    return dataclasses.replace(LAW, length=length, pairs=pairs)


def layers(slow: bool = False) -> dict[str, LayerConfig]:
    """All that a folder of layers holds, as they are by default; and a window, to see what a state is worth."""
    found = {name: cls() for name, cls in memories().items() if name not in SAME and (slow or name not in SLOW)}
    return {**found, "window of 16": Attention(window=16, rope_theta=None)}


def study(trial: Trial, widths: tuple[int, ...], mixers: dict[str, LayerConfig]) -> Study:
    return Study(
        about="How much does a layer recall, beside the bytes of state that it recalls from?",
        base=experiment(next(iter(mixers.values())), trial),
        axes=(axis("memory", "model.stages.0.pattern.1", mixers), axis("width", "model.D", widths)),
        versus="state_bytes",
    )


def claims(D: int) -> tuple[Claim, ...]:
    """The order at a width, where the published figure has one."""
    source = "Zoology, figure of the Based mixture (2024): the order at about 17 and 34 kB"
    pairs = (
        ("GatedDeltaNet", "GLA", "Gated DeltaNet recalls more than GLA."),
        ("GLA", "window of 16", "GLA recalls more than a sliding window."),
        ("DeltaNet", "Mamba2", "DeltaNet recalls more than Mamba-2."),
        ("DeltaNet", "LinearAttention", "The delta rule recalls more than a sum of outer products."),
        ("Attention", "GatedDeltaNet", "Attention recalls what a fixed state does not."),
        ("GatedDeltaNet", "Retention", "Erasing by key recalls more than fading by the clock."),
    )
    return tuple(Claim(says, source, f"{more}, {D}", f"{less}, {D}") for more, less, says in pairs)


_few = {name: layers()[name] for name in ("Attention", "GatedDeltaNet", "LinearAttention", "window of 16")}
_laptop = Trial(
    probe([law(64, 4), law(64, 8), law(64, 16)], [law(64, 4), law(64, 8), law(64, 16), law(128, 32)], 256),
    steps=450,
)
tiers = {
    "smoke": dataclasses.replace(
        study(Trial(probe([LAW], [LAW, law(64, 8)], 64, B=32), steps=60), (32, 64), _few), seeds=1, checks=4
    ),
    "laptop": dataclasses.replace(
        study(_laptop, (32, 64, 96), layers()),
        claims=claims(64),
        references=REFERENCES,
        notes="The published points are of 8,192 words, up to 64 pairs trained on and 256 asked, at the best of four "
        "learning rates; ours of 256 words, up to 16 pairs trained on and 32 asked, at one. Bytes are all that a layer "
        "carries from token to token, the tails of convolutions and momenta too; the published count leaves these out.",
    ),
    "paper": dataclasses.replace(
        study(Trial(BASED, steps=32 * 707, lr=3.2e-3), (64, 128, 256), layers(slow=True)),
        rates=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
        goal=0.99,
        claims=claims(128),
        references=REFERENCES,
    ),
}
