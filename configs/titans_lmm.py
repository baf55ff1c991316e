"""Titans' long-term memory alone, bytes of Python source; @170M to @1.3B are the paper's."""

from collections.abc import Callable, Mapping

from layers.layer import LayerConfig
from layers.mlp import MLP
from layers.titans import Titans
from models.lm import LM, Stage
from training.data import Text
from training.experiment import AdamW, Experiment, Mesh, Muon, Schedule, Train

# Blocks, width, heads, peak learning rate, billions of tokens (Titans, arXiv 2501.00663, appendix; Miras has the same),
# and the pod.
TITANS = {
    "170M": (12, 768, 16, 3e-3, 15, "v5e:4x4"),
    "340M": (24, 1024, 16, 1.5e-3, 15, "v5e:4x8"),
    "760M": (24, 1536, 16, 1.25e-3, 30, "v5e:8x8"),
    "1.3B": (18, 2048, 8, 7e-4, 100, "v6e:8x8"),
}
FSDP = Mesh(data=1, fsdp=-1)


def laptop(about: str, mixer: LayerConfig, parameters: int) -> Experiment:
    """Four blocks of width 128, some minutes on two cores."""
    return Experiment(
        description=about,
        model=LM(W=257, D=128, stages=(Stage((mixer, MLP()), repeats=4),)),
        data=Text(T=256, B=8),
        optimizer=Muon(lr=5e-3, schedule=Schedule(warmup=30, shape="wsd", final=0.0, decay=0.4)),
        train=Train(steps=300, log_every=10, eval_every=100, checkpoint_every=100),
        parameters=parameters,
        sample="import os\n\ndef ",
    )


def paper(
    about: str,
    mixer: Callable[[int], LayerConfig],
    sizes: Mapping[str, tuple[int, int, int, float, float, str]],
    counts: list[int],
    T: int = 4096,
) -> dict[str, Experiment]:
    """The papers' sizes: rows of T tokens of web text, half a million a step; `mixer` of the number of heads. The
    smallest lie whole on every chip, the others in parts.

    Put the text and a Llama-2 tokenizer where the config says, or name others: --data.source, --data.tokenizer.
    """
    tokens = 1 << 19
    return {
        name: Experiment(
            description=f"{about.split(',')[0]}, {name}.",
            model=LM(
                W=32_000, D=D, stages=(Stage((mixer(H), MLP()), repeats=blocks),), dtype="bfloat16", remat="block"
            ),
            data=Text(T=T, B=tokens // T, source="data/fineweb-edu", tokenizer="data/llama-2/tokenizer.json"),
            optimizer=AdamW(lr=lr, schedule=Schedule(warmup=1000, shape="cosine", final=0.1)),
            train=Train(steps=round(billions * 1e9 / tokens), eval_every=1000, checkpoint_every=1000),
            mesh=FSDP if D >= 1024 else Mesh(),
            parameters=count,
            pod=pod,
        )
        for (name, (blocks, D, H, lr, billions, pod)), count in zip(sizes.items(), counts, strict=True)
    }


config = laptop(__doc__, Titans(H=4, persistent=4), 1_137_248)
sizes = paper(
    __doc__, lambda H: Titans(H=H, persistent=128), TITANS, [146_917_824, 412_750_592, 871_569_408, 1_199_840_608]
)
