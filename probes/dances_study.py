"""Recall far beyond a window: dances asked for by name, by attention, a window, and chunk attention beside the window.

    python -m probes.dances_study             writes results/chunk_attention/: study.jsonl, study.md, dances.png
    python -m probes.dances_study --seeds 1 --steps 40 --folder runs/study      a look

Four dances of eight moves with delays of 0 and 8 in training, and up to 32 when asked (probes/tasks/dances.py). Two
blocks, width 64, a gated convolution before each mixer: attention over everything; over a window of 16 tokens; that
window and chunks of 8 tokens of which a token reads 2 (HCAM); chunks and its own under one softmax (MoBA); Gated
DeltaNet. What is in study.jsonl is not trained again.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console

from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.gated_conv import GatedConv
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from models.lm import LM, Stage
from probes.small_runs import Ledger, SmallRun, curves
from probes.tasks.dances import Dances
from training.experiment import AdamW, Schedule

DELAYS, WINDOW = (0, 8, 16, 32), 16
MIXERS: dict[str, LayerConfig] = {
    "attention": Attention(H=2),
    f"window of {WINDOW}": Attention(H=2, window=WINDOW),
    "window and chunks (HCAM)": ChunkAttention(H=2, chunk=8, top=2, window=WINDOW),
    "chunks in one softmax (MoBA)": ChunkAttention(H=2, chunk=8, top=2, weight="union", position="rope"),
    "Gated DeltaNet": GatedDeltaNet(H=2),
}


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    alone = {delay: Dances(tests=(delay,), delays=(delay,)).build() for delay in DELAYS}
    for name, mixer in MIXERS.items():
        model = LM(W=48, D=64, stages=(Stage((GatedConv(), mixer), 2),), tied=True)
        optimizer = AdamW(lr=3e-3, schedule=Schedule(warmup=20, shape="cosine", final=0.0))
        run, asked = None, {}
        for seed in range(seeds):
            if ledger.has(name=name, seed=seed, steps=steps, delay=DELAYS[-1]):
                continue
            if run is None:
                run = SmallRun(model, Dances(tests=(8,)).build(), optimizer, steps)
                asked = {delay: SmallRun(model, data, optimizer, steps) for delay, data in alone.items()}
            start = time.time()
            *_, (_, params, loss) = run.train(seed, steps)
            for delay, other in asked.items():
                ledger.add(name=name, seed=seed, steps=steps, delay=delay, accuracy=other.accuracy(params), loss=loss)
            said = ", ".join(f"{row['delay']}: {row['accuracy']:.3f}" for row in ledger.rows[-len(DELAYS) :])
            console.print(f"{name}, seed {seed}: by delay {said} ({time.time() - start:.0f} s)")


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["steps"] == steps and row["seed"] < seeds]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves(axes, rows, "delay", "accuracy", list(MIXERS))
    axes.set(xlabel="filler after each dance (trained: 0 and 8)", ylabel="moves said right", ylim=(0, 1.02))
    axes.set_xticks(DELAYS)
    axes.set_title(f"Dances by name, {steps} steps; bands: least and most of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(folder / "dances.png", dpi=130)
    lines = ["| model | delay | right | ± |", "|---|---:|---:|---:|"]
    for name in MIXERS:
        for delay in DELAYS:
            hits = [row["accuracy"] for row in rows if row["name"] == name and row["delay"] == delay]
            spread = np.std(hits, ddof=1) if len(hits) > 1 else 0.0
            lines.append(f"| {name} | {delay} | {np.mean(hits):.3f} | {spread:.3f} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/chunk_attention"))
    parser.add_argument("--steps", type=int, default=400, help="of training, 32 rows each (default 400)")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ledger = Ledger(options.folder / "study.jsonl")
    study(ledger, options.steps, options.seeds, Console())
    report(ledger, options.folder, options.steps, options.seeds)
    print(f"wrote {options.folder}/study.md, dances.png")


if __name__ == "__main__":
    main()
