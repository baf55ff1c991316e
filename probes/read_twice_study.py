"""Read once, read twice, or read ahead (JRT, arXiv 2407.05483): set disjointness with the small set first or last.

    python -m probes.read_twice_study            writes results/read_twice/: study.jsonl, study.md, read_twice.png
    python -m probes.read_twice_study --seeds 1 --steps 40 --folder runs/study      a look

Three blocks of a gated convolution, Based's linear attention and an MLP, width 64; 2 heads of K = 3 by 4, 100 floats a
layer for 60 words. `once` reads a row as it is; `twice` reads it and then reads it again; `ahead` has an encoder, two
maps a layer more and the same state, that is told both sets before the first token. Beside them `attention`, which has
the whole row to look at: what can be had. A model is trained on both orders of all sizes at once. What is in
study.jsonl is not trained again.
"""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console

from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from layers.mlp import MLP
from layers.prefix import PrefixLinearAttention
from models.lm import LM, Stage
from probes.small_runs import Ledger, Questions, SmallRun, curves, door, train_and_ask
from probes.tasks.disjointness import Reading, mirrored, parts
from probes.tasks.task import Probe
from training.experiment import Muon, Schedule

SMALL, LARGE, VOCAB = 4, (8, 24), 64
SIZES = mirrored(*((SMALL, n) for n in LARGE))
KINDS: dict[str, tuple[LayerConfig, Reading]] = {
    "once": (LinearAttention(H=2, K=3, V=4, feature_map="taylor", chunk=32), "once"),
    "twice": (LinearAttention(H=2, K=3, V=4, feature_map="taylor", chunk=32), "twice"),
    "ahead": (PrefixLinearAttention(H=2, K=3, V=4, chunk=32), "ahead"),
    "attention": (Attention(H=2, rope_theta=None), "once"),
}


def model_of(mixer: LayerConfig) -> LM:
    return LM(W=VOCAB, D=64, stages=(Stage((GatedConv(), mixer, MLP(F=128)), 3),), tied=True, scan_layers="always")


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    for name, (mixer, reading) in KINDS.items():
        model = model_of(mixer)
        optimizer = Muon(lr=1e-2, schedule=Schedule(warmup=20, shape="cosine", final=0.0))
        train, test = (parts(SIZES, rows, vocab=VOCAB, reading=reading) for rows in (0, 1024))
        data = Probe(B=64, train=train, test=test).build()
        run = functools.partial(SmallRun, model, data, optimizer, steps)
        questions: Questions = [
            (
                {"order": "first" if m == SMALL else "last", "large": max(m, n)},  # order: where the small set is
                functools.partial(data.questions, part, T=data.config.T),
            )
            for (m, n), part in zip(SIZES, test, strict=True)
        ]
        alone = name == "attention"  # nothing is in doubt there
        train_and_ask(ledger, {"name": name}, run, questions, steps, 1 if alone else seeds, console)


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["steps"] == steps and row["seed"] < seeds]
    figure, pair = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for order, axes in zip(("first", "last"), pair, strict=True):
        curves(axes, [row for row in rows if row["order"] == order], "large", "accuracy", list(KINDS))
        axes.axhline(1 / SMALL, color="gray", ls=":", lw=1)
        axes.set(xlabel="tokens of the larger set", ylim=(0, 1.02), xticks=LARGE)
        axes.set_title(f"the set of {SMALL} tokens is {order}")
    pair[0].set_ylabel("shared token named")
    figure.suptitle(f"Set disjointness after {steps} steps; bands: least and most of {seeds} seeds; dotted: chance")
    figure.tight_layout()
    figure.savefig(folder / "read_twice.png", dpi=130)
    lines = [
        f"| model | larger set | {SMALL} first | ± | {SMALL} last | ± | first − last |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in KINDS:
        for n in LARGE:
            hits = [
                [row["accuracy"] for row in rows if (row["name"], row["large"], row["order"]) == (name, n, order)]
                for order in ("first", "last")
            ]
            said = " | ".join(f"{np.mean(h):.3f} | {np.std(h, ddof=1) if len(h) > 1 else 0.0:.3f}" for h in hits)
            lines.append(f"| {name} | {n} | {said} | {np.mean(hits[0]) - np.mean(hits[1]):+.3f} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    door(__doc__, study, report, Path("results/read_twice"))
