"""A mixture of memories against one memory of the same state: associative recall (MQAR) with more and more pairs.

    python -m probes.mixture_study            writes results/mixture/: study.jsonl, study.md, recall.png
    python -m probes.mixture_study --seeds 1 --steps 40 --folder runs/study      a look

Gated DeltaNet behind a gated convolution, width 64. `one small`: 2 heads of 8 by 8. `one large`: 2 of 16 by 16, the
state of four small ones. `mixture`: four small ones, two for a token, none shared; the state of `one large`, of which a
token touches half. Everything is trained on all numbers of pairs at once. What is in study.jsonl is not trained again.
"""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console

from layers.gated_conv import GatedConv
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from layers.mixture import MixtureOfMemories
from models.lm import LM, Stage
from probes.small_runs import Ledger, Questions, SmallRun, curves, door, train_and_ask
from probes.tasks.recall import parts
from probes.tasks.task import Part, Probe
from training.experiment import AdamW, Schedule

PAIRS, T, W = (2, 4, 8), 64, 128
SMALL = GatedDeltaNet(H=2, K=8, V=8)
MIXERS: dict[str, LayerConfig] = {
    "one small": SMALL,
    "one large": GatedDeltaNet(H=2, K=16, V=16),
    "mixture": MixtureOfMemories(SMALL, M=4, top=2, shared=False, balance=1e-2),
}


def data_of(pairs: tuple[int, ...]) -> Probe:
    def segments(rows: int) -> tuple[Part, ...]:
        return parts(rows, *((T, n) for n in pairs), vocab=W, filler="conflict_free")

    return Probe(T=T, B=128, train=segments(40_000), test=segments(512))


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    questions: Questions = [({"pairs": n}, data_of((n,)).build().held_out) for n in PAIRS]
    for name, mixer in MIXERS.items():
        model = LM(W=W, D=64, stages=(Stage((GatedConv(), mixer)),), tied=True)
        optimizer = AdamW(lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0))
        run = functools.partial(SmallRun, model, data_of(PAIRS).build(), optimizer, steps)
        train_and_ask(ledger, {"name": name}, run, questions, steps, seeds, console)


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["steps"] == steps and row["seed"] < seeds]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves(axes, rows, "pairs", "accuracy", list(MIXERS))
    axes.set(xlabel="pairs in a row of 64 tokens", ylabel="questions answered right", ylim=(0, 1.02), xticks=PAIRS)
    axes.set_title(f"Associative recall after {steps} steps; bands: least and most of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(folder / "recall.png", dpi=130)
    lines = ["| model | state, floats | pairs | right | ± |", "|---|---:|---:|---:|---:|"]
    for name, mixer in MIXERS.items():
        one = mixer if isinstance(mixer, GatedDeltaNet) else SMALL
        assert one.K and one.V
        floats = one.H * one.K * one.V * getattr(mixer, "M", 1)
        for n in PAIRS:
            hits = [row["accuracy"] for row in rows if row["name"] == name and row["pairs"] == n]
            spread = np.std(hits, ddof=1) if len(hits) > 1 else 0.0
            lines.append(f"| {name} | {floats} | {n} | {np.mean(hits):.3f} | {spread:.3f} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    door(__doc__, study, report, Path("results/mixture"))
