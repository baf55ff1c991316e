"""JRT-RNN: Based that reads a region ahead, bytes of Python source; @360M and @1.3B are the paper's."""

import dataclasses

from configs import based
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.prefix import PrefixLinearAttention
from models.lm import LM, Stage
from training.experiment import AdamW, Experiment, Schedule, Train
from training.prefix import PrefixText

# Steps of 256 rows of 2,048 tokens, and of warm-up; sizes of JRT, arXiv 2407.05483, whose training code has one layer
# of Based's 27 less at 360M.
STEPS = {"360M": (60_000, 600), "1.3B": (100_000, 1000)}


def with_encoder(stage: Stage) -> Stage:
    """Linear attention that may read ahead, all else as it is."""

    def encoder(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer, LinearAttention):
            return layer
        return PrefixLinearAttention(**{f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)})

    return Stage(tuple(map(encoder, stage.pattern)), stage.repeats)


def jrt(experiment: Experiment, description: str, parameters: int, prefix: int) -> Experiment:
    """A twin of Based with encoders, a word more for what is hidden, and half of each row read ahead."""
    model, data = experiment.model, experiment.data
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    return dataclasses.replace(
        experiment,
        description=description,
        model=dataclasses.replace(model, W=model.W + 1, stages=tuple(map(with_encoder, model.stages))),
        data=PrefixText(**fields, prefix=prefix),
        parameters=parameters,
    )


def paper(size: str, parameters: int) -> Experiment:
    experiment = based.sizes[size]
    steps, warmup = STEPS[size]
    model: LM = experiment.model
    if size == "360M":
        *stages, ends = model.stages
        model = dataclasses.replace(model, stages=(*stages, dataclasses.replace(ends, repeats=1)))
    return dataclasses.replace(
        jrt(dataclasses.replace(experiment, model=model), f"JRT-RNN, {size}.", parameters, 1024),
        optimizer=AdamW(lr=8e-4, schedule=Schedule(warmup=warmup, shape="cosine", final=0.1)),
        train=Train(steps=steps, eval_every=1000, checkpoint_every=1000),
    )


config = jrt(based.config, __doc__, 799_104, 128)
sizes = {"360M": paper("360M", 356_572_160), "1.3B": paper("1.3B", 1_375_132_416)}
