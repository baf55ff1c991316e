"""Recall beside bytes of state, every layer that mixes tokens at three widths: the figure of Based and Zoology."""

import dataclasses

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.mamba2 import Mamba2
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
# Which of ours stands beside which of theirs; some are for that alone, with their heads and sizes of state.
BESIDE = {
    "attention": "Attention",
    "DeltaNet": "DeltaNet",
    "Gated DeltaNet": "GatedDeltaNet, 2 heads",
    "GLA": "GLA",
    "Based": "Based",
}


def beside(name: str, size: int) -> str:
    if name == "sliding window":
        return "window of 16" if size < 15_000 else "window of 64"
    if name == "Mamba-2":
        return "Mamba2, state 16" if size < 16_000 else "Mamba2"
    return BESIDE[name]


REFERENCES = tuple(
    Reference(name, value, size, beside(name, size)) for name, points in PUBLISHED.items() for size, value in points
)


def law(length: int, pairs: int) -> Task:
    return dataclasses.replace(LAW, length=length, pairs=pairs)


def layers(slow: bool = False) -> dict[str, LayerConfig]:
    """All that a folder of layers holds, as they are by default; windows, and some at other bytes, as published."""
    found = {name: cls() for name, cls in memories().items() if name not in SAME and (slow or name not in SLOW)}
    others: dict[str, LayerConfig] = {
        "window of 16": Attention(window=16, rope_theta=None),
        "window of 64": Attention(window=64, rope_theta=None),
        "Based": LinearAttention(feature_map="taylor", K=8),
        "GatedDeltaNet, 2 heads": GatedDeltaNet(H=2),
        "Mamba2, state 16": Mamba2(K=16),
    }
    return {**found, **others}


def study(trial: Trial, widths: tuple[int, ...], mixers: dict[str, LayerConfig]) -> Study:
    return Study(
        about="How much does a layer recall, beside the bytes of state that it recalls from?",
        base=experiment(next(iter(mixers.values())), trial),
        axes=(axis("memory", "model.stages.0.pattern.1", mixers), axis("width", "model.D", widths)),
        versus="state_bytes",
    )


def claims(D: int) -> tuple[Claim, ...]:
    """The order at a width."""
    source = "Zoology, figure of the Based mixture (2024)"
    pairs = (
        ("GatedDeltaNet", "GLA", "Gated DeltaNet recalls more than GLA."),
        ("GLA", "window of 16", "GLA recalls more than a sliding window."),
        ("DeltaNet", "Mamba2", "DeltaNet recalls more than Mamba-2."),
        ("DeltaNet", "LinearAttention", "The delta rule recalls more than a sum of outer products."),
        ("Attention", "GatedDeltaNet", "Attention recalls what a fixed state does not."),
        ("GatedDeltaNet", "Retention", "Erasing by key recalls more than fading by the clock."),
    )
    return tuple(Claim(says, source, f"{more}, {D}", f"{less}, {D}") for more, less, says in pairs)


def at_equal_bytes() -> tuple[Claim, ...]:
    """The order at fixed bytes of state: the published one at about 17 kB, and at those that both of ours reach."""
    source = "Zoology, figure of the Based mixture (2024): 0.96 and 0.89 > 0.77 and 0.72 to 0.84 > 0.69 > 0.14"
    pairs = (
        ("DeltaNet", "Based", 12_000, "DeltaNet recalls more than Based."),
        ("GatedDeltaNet, 2 heads", "Based", 17_000, "Gated DeltaNet recalls more than Based."),
        ("GatedDeltaNet, 2 heads", "GLA", 5_000, "Gated DeltaNet recalls more than GLA."),
        ("DeltaNet", "Mamba2, state 16", 12_000, "DeltaNet recalls more than Mamba-2."),
        ("GatedDeltaNet, 2 heads", "Mamba2, state 16", 12_000, "Gated DeltaNet recalls more than Mamba-2."),
        ("Based", "Mamba2, state 16", 12_000, "Based recalls more than Mamba-2."),
        ("GLA", "window of 16", 5_000, "GLA recalls more than a window."),
        ("Mamba2, state 16", "window of 16", 12_000, "Mamba-2 recalls more than a window."),
    )
    return tuple(Claim(says, source, more, less, at=size) for more, less, size, says in pairs)


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
        claims=(*at_equal_bytes(), *claims(64)),
        references=REFERENCES,
        notes="The published points are of 8,192 words, up to 64 pairs trained on and 256 asked, at the best of four "
        "learning rates; ours of 256 words, up to 16 pairs trained on and 32 asked, at one: a layer that did not learn "
        "may do so at another. Bytes are all that a layer carries from token to token, the tails of convolutions and "
        "momenta too; the published count leaves these out. RWKV-7, H3, Hyena and Mamba, which are published, are not "
        "among ours; Moneta and Memora, which form the weights of every token, are in the paper tier alone.",
    ),
    "paper": dataclasses.replace(
        study(Trial(BASED, steps=32 * 707, lr=3.2e-3), (64, 128, 256), layers(slow=True)),
        rates=(1e-3, 3.2e-3, 1e-2, 3.2e-2),
        goal=0.99,
        claims=claims(128),
        references=REFERENCES,
    ),
}
