"""Based: Taylor features, a window, gated convolutions, bytes of Python source; @360M and @1.3B are the paper's."""

import dataclasses

from configs.titans_lmm import FSDP, laptop
from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Text
from training.experiment import AdamW, Experiment, Schedule, Train


def mixers(D: int, H: int, K: int, window: int) -> tuple[LayerConfig, LayerConfig, LayerConfig]:
    """The convolution, the Taylor memory and the window, of which a token sees itself and `window` before it."""
    return (
        GatedConv(F=2 * D),
        LinearAttention(H=H, K=K, feature_map="taylor"),
        Attention(H=H, window=window + 1, rope_theta=None),
    )


def stage(layers: tuple[LayerConfig, ...], D: int, repeats: int = 1) -> Stage:
    return Stage(tuple(part for layer in layers for part in (layer, MLP(F=2 * D))), repeats)


def paper(size: str, D: int, parameters: int, pod: str) -> Experiment:
    """Taylor and window at 1-2, 6-7, 11-12, 16-17, 21-22, and at 1.3B also 27-28 and 33-34; convolutions elsewhere."""
    conv, taylor, window = mixers(D, 16, 16, 128)
    five = (conv, taylor, window, conv, conv)
    ends = [stage((conv,), D, 2)]
    if size == "1.3B":
        ends = [stage((conv,), D), stage(five, D), stage((conv,), D), stage(five[:4], D)]
    return Experiment(
        description=f"Based, {size}.",
        model=LM(W=50_257, D=D, stages=(stage(five, D, 5), *ends), tied=True, dtype="bfloat16", remat="block"),
        data=Text(T=2048, B=256, source="data/pile", tokenizer="data/gpt2/tokenizer.json"),
        optimizer=AdamW(lr=8e-4, schedule=Schedule(warmup=200, shape="cosine", final=0.1)),
        train=Train(steps=20_000, eval_every=1000, checkpoint_every=1000),
        mesh=FSDP,
        parameters=parameters,
        pod=pod,
    )


config = laptop(__doc__, GatedConv(), 774_272)
conv, taylor, window = mixers(128, 4, 16, 64)
config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, stages=(stage((conv, taylor, window, conv), 128),))
)
sizes = {
    "360M": paper("360M", 1024, 362_613_760, "v5p:2x2x4"),
    "1.3B": paper("1.3B", 1792, 1_349_440_512, "v5p:2x4x4"),
}
