"""What each part of Titans' memory is for: the paper's table of components, on recall after overwriting."""

import dataclasses

from layers.attention import Attention
from layers.layer import LayerConfig
from layers.memory_as_context import MemoryAsContext
from layers.memory_as_gate import MemoryAsGate
from layers.memory_as_layer import MemoryAsLayer
from layers.titans import Titans
from probes.study import Claim, Study, axis
from probes.tasks.overwrite import Overwrite
from probes.tasks.task import Trial, discover, probe
from probes.trial import experiment

SOURCE = "Titans, arXiv 2501.00663, table 5: perplexity and long-context accuracy, 400M parameters"
LAW = Overwrite(vocab=16, length=64, keys=4)
LONG, FAR = Overwrite(vocab=128, length=1024, keys=32), (1024, 4096, 16_384)  # far beyond the window and a segment


def claims(longest: int) -> tuple[Claim, ...]:
    return (
        *CLAIMS,
        Claim(
            "In long rows a linear memory costs most.",
            SOURCE,
            "no forgetting",
            "linear memory",
            slice=f"length {longest}",
        ),
    )


def variants(titans: Titans, window: int, persistent: int) -> dict[str, LayerConfig]:
    """The whole memory, then each part left out; the compositions with attention at the end."""

    def but(**changes) -> Titans:
        return dataclasses.replace(titans, **changes)

    attention = Attention(H=titans.H, window=window, persistent=persistent)
    return {
        "whole": titans,
        "linear memory": but(depth=1),
        "no convolution": but(conv=0),
        "no momentum": but(momentum=False),
        "no forgetting": but(keep=False),
        "no persistent tokens": but(persistent=0),
        "as context": MemoryAsContext(titans, H=titans.H, segment=4 * window, persistent=persistent),
        "as gate": MemoryAsGate(attention, titans),
        "as layer": MemoryAsLayer(titans, attention),
    }


def study(trial: Trial, mixers: dict[str, LayerConfig]) -> Study:
    return Study(
        about="How much of what was overwritten does Titans recall without each of its parts?",
        base=experiment(mixers["whole"], trial),
        axes=(axis("memory", "model.stages.0.pattern.1", mixers),),
    )


CLAIMS = (
    Claim("A deep memory recalls more than a linear one.", SOURCE, "whole", "linear memory"),
    Claim("The convolution helps.", SOURCE, "whole", "no convolution"),
    Claim("Momentum helps.", SOURCE, "whole", "no momentum"),
    Claim("Forgetting helps.", SOURCE, "whole", "no forgetting"),
    Claim("Persistent tokens help.", SOURCE, "whole", "no persistent tokens"),
    Claim("Attention to a window and the memory as a gate recall more than the memory.", SOURCE, "as gate", "whole"),
    Claim("So do segments with the memory as context.", SOURCE, "as context", "whole"),
    Claim("So does the memory before attention.", SOURCE, "as layer", "whole"),
    Claim("Forgetting is worth more than momentum.", SOURCE, "no momentum", "no forgetting"),
    Claim("Momentum is worth more than the convolution.", SOURCE, "no convolution", "no momentum"),
    Claim("The convolution is worth more than persistent tokens.", SOURCE, "no persistent tokens", "no convolution"),
    Claim(
        "It models language better, and answers questions of common sense.",
        SOURCE,
        untestable="models of this size learn no common sense",
    ),
)
# Steps as long as chunks of 4 tokens bear with momentum up to a half: a key that is told anew is to be answered anew.
SMALL = Titans(H=2, chunk=4, momentum_max=0.5, lr_max=0.25, persistent=4)
_trial = discover()["overwrite"]
tiers = {
    "smoke": dataclasses.replace(
        study(
            Trial(probe([LAW], [LAW], 32, B=16), steps=30, D=32),
            {name: variants(SMALL, 4, 4)[name] for name in ("whole", "linear memory")},
        ),
        seeds=1,
        checks=3,
    ),
    "laptop": dataclasses.replace(
        study(_trial, variants(SMALL, 4, 4)),
        claims=claims(1024),
        notes="Rows of 64 tokens tell keys new values and ask for the last; asked up to 1,024 tokens. Chunks of 4 "
        "tokens and a window of 4, where the paper has 16 and 2,048. Parameters are not matched: the linear memory has "
        "two thirds of the whole one's, and attention beside it adds 38 to 56%.",
    ),
    "paper": dataclasses.replace(
        study(
            Trial(probe([LONG], [dataclasses.replace(LONG, length=T) for T in FAR], 256, B=32), 20_000, lr=3e-3, D=256),
            variants(Titans(H=4, persistent=16), 64, 16),
        ),
        rates=(1e-3, 3e-3),
        claims=claims(FAR[-1]),
    ),
}
