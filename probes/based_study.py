"""Based's trade-off: associative recall (MQAR) against bytes of state, as window and feature dimension vary.

    python -m probes.based_study              writes results/based/: study.jsonl, study.md, trade.png
    python -m probes.based_study --seeds 1 --steps 40 --folder runs/study        a look

One mixer of width 64 and one head behind a gated convolution, as in Based (Arora et al. 2024, arXiv 2402.18668, figure
2, whose rows are longer and models larger). `window`: attention to the last tokens. `Taylor`: linear attention with so
many features, of which the map makes 1 + f + f². `both`: the Taylor map and then a window of 16. Rows of 64 tokens with
4, 8 or 16 pairs, all trained on at once. Bytes are those of the state that a model carries, measured, the convolution's
included. What is in study.jsonl is not trained again.
"""

import functools
from pathlib import Path

import jax
import matplotlib
from flax import nnx
from rich.console import Console

from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig
from layers.linear import LinearAttention
from models.lm import LM, Stage
from probes.small_runs import Ledger, Questions, SmallRun, curves, door, spread, train_and_ask
from probes.tasks.recall import parts
from probes.tasks.task import Part, Probe
from training.experiment import AdamW, Schedule
from training.summary import state_bytes

PAIRS, T, W, NEAR = (4, 8, 16), 64, 128, 16
WINDOWS, FEATURES = (8, 16, 32, 64), (2, 4, 8)


def models() -> dict[tuple[str, int], LM]:
    """By name, and the window or the number of features."""

    def of(*mixers: LayerConfig) -> LM:
        return LM(W=W, D=64, stages=(Stage((GatedConv(), *mixers)),), tied=True)

    def window(w: int) -> Attention:
        return Attention(H=1, window=w, rope_theta=None)

    def taylor(f: int) -> LinearAttention:
        return LinearAttention(H=1, K=f, feature_map="taylor")

    return {
        **{("window", w): of(window(w)) for w in WINDOWS},
        **{("Taylor", f): of(taylor(f)) for f in FEATURES},
        **{("both", f): of(taylor(f), window(NEAR)) for f in FEATURES},
    }


def size_of(model: LM) -> int:
    """Bytes of the state of one sequence of T tokens."""
    return state_bytes(jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))), T)


def data_of(pairs: tuple[int, ...]) -> Probe:
    def segments(rows: int) -> tuple[Part, ...]:
        return parts(rows, *((T, n) for n in pairs), vocab=W, filler="conflict_free")

    return Probe(T=T, B=64, train=segments(40_000), test=segments(256))


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    questions: Questions = [({"pairs": n}, data_of((n,)).build().held_out) for n in PAIRS]
    for (name, size), model in models().items():
        optimizer = AdamW(lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0))
        run = functools.partial(SmallRun, model, data_of(PAIRS).build(), optimizer, steps)
        key = {"name": name, "size": size, "state": size_of(model)}
        train_and_ask(ledger, key, run, questions, steps, seeds, console)


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["steps"] == steps and row["seed"] < seeds]
    names = list(dict.fromkeys(name for name, _ in models()))
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves(axes, [row for row in rows if row["pairs"] == PAIRS[-1]], "state", "accuracy", names)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes of state", ylabel=f"questions answered right, {PAIRS[-1]} pairs", ylim=(0, 1.02))
    axes.set_title(f"Recall and state after {steps} steps; bands: least and most of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(folder / "trade.png", dpi=130)
    lines = [
        f"| model | state, bytes | {' | '.join(f'{n} pairs' for n in PAIRS)} |",
        "|---|" + "---:|" * (1 + len(PAIRS)),
    ]
    for (name, size), model in models().items():
        cells = []
        for n in PAIRS:
            hits = [r["accuracy"] for r in rows if (r["name"], r["size"], r["pairs"]) == (name, size, n)]
            cells.append(spread(hits))
        lines.append(f"| {name} {size} | {size_of(model)} | {' | '.join(cells)} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    door(__doc__, study, report, Path("results/based"), steps=300)
