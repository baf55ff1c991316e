"""Mixture of memories over Gated DeltaNet, bytes of Python source; @340M and @1.3B are the paper's."""

import dataclasses

from configs.titans_lmm import laptop, paper
from layers.gated_deltanet import GatedDeltaNet
from layers.mixture import MixtureOfMemories
from training.experiment import Experiment, Schedule

# Blocks, width, heads, peak learning rate, billions of tokens (arXiv 2502.13685, section 4.1), pod. Of 1.3B the paper
# gives the width; twice the heads are ours, so that they stay 256 wide. A mixture counts more than its name says: each
# of its memories has maps of its own (the paper says 444M for its 340M).
PAPER = {"340M": (24, 1024, 4, 3e-4, 15, "v5e:8x8"), "1.3B": (24, 2048, 8, 3e-4, 100, "v6e:8x8")}


def as_printed(experiment: Experiment) -> Experiment:
    """Embeddings tied, 1,024 steps of warm-up."""
    optimizer = dataclasses.replace(experiment.optimizer, schedule=Schedule(warmup=1024, shape="cosine", final=0.1))
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, tied=True), optimizer=optimizer)


config = laptop(__doc__, MixtureOfMemories(GatedDeltaNet(H=4)), 1_668_704)
sizes = {
    name: as_printed(experiment)
    for name, experiment in paper(
        __doc__,
        lambda H: MixtureOfMemories(GatedDeltaNet(H=H, K=256, V=256)),
        PAPER,
        [564_255_936, 2_190_582_144],
        T=2048,
    ).items()
}
