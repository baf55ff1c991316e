"""A needle in rows up to sixteen times as long as those trained on: positions, windows, states."""

import dataclasses
from collections.abc import Mapping

from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from layers.mamba2 import Mamba2
from layers.memory_as_gate import MemoryAsGate
from layers.retention import Retention
from layers.titans import Titans
from probes.study import Claim, Study, axis
from probes.tasks.task import Trial, discover
from probes.trial import experiment

NOPE = "Kazemnejad et al. 2023, arXiv 2305.19466: without positions lengths generalise best"
TITANS = Titans(chunk=4, momentum_max=0.5)
LAYERS: dict[str, LayerConfig] = {
    "attention, rotary": Attention(),
    "attention, no places": Attention(rope_theta=None),
    "window of 16": Attention(window=16),
    "chunks and a window": ChunkAttention(chunk=8, top=4, window=16, position="none"),
    "Gated DeltaNet": GatedDeltaNet(),
    "Mamba-2": Mamba2(),
    "Retention": Retention(),
    "Titans": TITANS,
    "Titans as gate": MemoryAsGate(Attention(window=16, persistent=0), TITANS),
}


def study(trial: Trial, layers: Mapping[str, LayerConfig] = LAYERS) -> Study:
    return Study(
        about="Which memories find a needle in rows longer than any that they were trained on?",
        base=experiment(next(iter(layers.values())), trial),
        axes=(axis("memory", "model.stages.0.pattern.1", layers),),
    )


def claims(length: int) -> tuple[Claim, ...]:
    far = f"length {length}"
    titans, delta = "Titans, arXiv 2501.00663, table 2", "Gated DeltaNet, arXiv 2412.06464, table 2"
    return (
        Claim("Titans finds more than Mamba-2 far beyond.", titans, "Titans", "Mamba-2", slice=far),
        Claim("Titans finds more than a delta rule.", titans, "Titans", "Gated DeltaNet", slice=far),
        Claim("Gated DeltaNet finds more than Mamba-2.", delta, "Gated DeltaNet", "Mamba-2", slice=far),
        Claim(
            "Titans beside a window finds more than the window.", titans, "Titans as gate", "window of 16", slice=far
        ),
        Claim("And more than Titans alone.", titans, "Titans as gate", "Titans", slice=far),
        Claim("Attention without places goes further.", NOPE, "attention, no places", "attention, rotary", slice=far),
    )


_few = {name: LAYERS[name] for name in ("attention, rotary", "window of 16", "Gated DeltaNet")}
_trials = discover()
tiers = {
    "smoke": dataclasses.replace(
        study(dataclasses.replace(_trials["niah_single@smoke"], steps=30), _few), seeds=1, checks=3
    ),
    "laptop": dataclasses.replace(
        study(_trials["niah_single"]),
        claims=claims(1024),
        notes="One needle among repeated words, rows of 64 tokens, asked up to 1,024. The papers train at 4,096 tokens "
        "of text and ask up to 16,384; the delta rule of Titans' table has no gate, ours has.",
    ),
    "paper": dataclasses.replace(study(_trials["niah_single@large"]), rates=(3e-4, 1e-3), claims=claims(16_384)),
}
