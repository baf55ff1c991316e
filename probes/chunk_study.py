"""Chunk attention beside a window, against the window alone and attention to everything: dances of long ago.

    python -m probes.chunk_study              writes results/chunk_attention/: study.jsonl, study.md, recall.png
    python -m probes.chunk_study --seeds 1 --steps 40 --folder runs/study        a look

A row shows four dances of three moves, `delay` tokens after each, and asks for one by name (probes/tasks/dances.py).
One mixer of width 64 behind a gated convolution, without positions. `window`: attention to the last 8 tokens. `chunks`:
the same window, and the 4 chunks of 8 tokens whose means answer best. `dances`: the same, but a chunk ends at the first
filler, so that a dance is one. `attention`: to all tokens. Trained on delays of 1 and 4, asked for up to 64. What is in
study.jsonl is not trained again.
"""

import dataclasses
import functools
from pathlib import Path

import matplotlib
from rich.console import Console

from layers.attention import Attention
from layers.chunk_attention import ChunkAttention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from models.lm import LM, Stage
from probes.small_runs import Ledger, Questions, SmallRun, curves, door, spread, train_and_ask
from probes.tasks.dances import Dances
from probes.tasks.task import Part, Probe
from training.experiment import Muon, Schedule

W, WINDOW, SHOWN, DELAYS = 64, 8, (1, 4), (1, 4, 16, 64)
CHUNKS = ChunkAttention(H=1, chunk=8, top=4, window=WINDOW, position="none")
MIXERS: dict[str, LayerConfig] = {
    "attention": Attention(H=1, rope_theta=None),
    "dances": dataclasses.replace(CHUNKS, boundary=(0,)),
    "chunks": CHUNKS,
    "window": Attention(H=1, window=WINDOW, rope_theta=None),
}


def data_of(delays: tuple[int, ...]) -> Probe:
    laws = [Dances(vocab=W, names=16, dances=4, moves=3, delay=delay) for delay in delays]
    return Probe(B=256, train=tuple(map(Part, laws)), test=tuple(Part(law, 128) for law in laws))


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    asked, longest = data_of(DELAYS), data_of(DELAYS).T
    questions: Questions = [
        ({"delay": delay}, functools.partial(asked.build().questions, part, T=longest))
        for delay, part in zip(DELAYS, asked.test, strict=True)
    ]
    for name, mixer in MIXERS.items():
        model = LM(W=W, D=64, stages=(Stage((GatedConv(), mixer)),), tied=True)
        optimizer = Muon(lr=3e-2, adam_lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0))
        run = functools.partial(SmallRun, model, data_of(SHOWN).build(), optimizer, steps)
        train_and_ask(ledger, {"name": name}, run, questions, steps, seeds, console)


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["steps"] == steps and row["seed"] < seeds]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves(axes, rows, "delay", "accuracy", list(MIXERS))
    axes.axvspan(min(SHOWN), max(SHOWN), color="grey", alpha=0.12, lw=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens after each dance (grey: trained on)", ylabel="moves said right", ylim=(0, 1.02))
    axes.set_xticks(DELAYS, map(str, DELAYS))
    axes.set_title(f"Dances of long ago after {steps} steps; bands: least and most of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(folder / "recall.png", dpi=130)
    lines = [f"| model | {' | '.join(f'delay {delay}' for delay in DELAYS)} |", "|---|" + "---:|" * len(DELAYS)]
    for name in MIXERS:
        cells = []
        for delay in DELAYS:
            hits = [row["accuracy"] for row in rows if row["name"] == name and row["delay"] == delay]
            cells.append(spread(hits))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    door(__doc__, study, report, Path("results/chunk_attention"), steps=350)
