"""Facts learned by heart, with a table of n-grams and without: how many steps, and what the table holds of them.

    python -m probes.engram_study             writes results/engram/: study.jsonl, study.md, facts.png
    python -m probes.engram_study --seeds 1 --steps 40 --folder runs/study      a look

4,096 facts: what follows two words (probes/tasks/facts.py). Two blocks of a gated convolution, attention and an MLP,
width 64: `without`; the same with MLPs that have as many parameters more as the table (`wide MLP`); and with an Engram
before the second block. At each point the Engram is also switched off. What is in study.jsonl is not trained again.
"""

import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
from flax import nnx
from rich.console import Console

from layers.attention import Attention
from layers.engram import Engram
from layers.gated_conv import GatedConv
from layers.mlp import MLP
from models.lm import LM, Stage
from models.parameters import flatten
from probes.small_runs import Ledger, SmallRun, curves, door
from probes.tasks.facts import Facts
from probes.tasks.task import Part, Probe
from training.experiment import AdamW, Schedule
from training.summary import parameter_count

W, D, EVERY, TABLE = 64, 64, 20, "1.0.0"  # the Engram's place in the model: stage, repeat, layer
DATA = Probe(B=32, train=(Part(Facts(vocab=W)),), test=(Part(Facts(vocab=W), 128),))
ENGRAM = Engram(W=W, N=3, H=2, K=8, rows=1 << 13)


def block(F: int) -> tuple[GatedConv, Attention, MLP]:
    return GatedConv(), Attention(H=4, window=8), MLP(F=F)


def models() -> dict[str, LM]:
    plain, wide = block(192), block(192 + 720)
    return {
        "without": LM(W=W, D=D, stages=(Stage(plain), Stage(plain))),
        "wide MLP": LM(W=W, D=D, stages=(Stage(wide), Stage(wide))),
        "Engram": LM(W=W, D=D, stages=(Stage(plain), Stage((ENGRAM, *plain)))),
    }


def study(ledger: Ledger, steps: int, seeds: int, console: Console) -> None:
    for name, model in models().items():
        optimizer = AdamW(lr=3e-3, weight_decay=0.0, schedule=Schedule(warmup=20, shape="constant"))
        run = None
        for seed in range(seeds):
            if ledger.has(name=name, seed=seed, step=steps):
                continue
            run = run or SmallRun(model, DATA.build(), optimizer, steps)
            start, rows = time.time(), []
            for done, params, loss in run.train(seed, EVERY):
                row = {"name": name, "seed": seed, "step": done, "accuracy": run.accuracy(params), "loss": loss}
                rows.append(row | ({"off": run.accuracy(params, (TABLE,))} if name == "Engram" else {}))
            for row in rows:
                ledger.add(**row)
            console.print(f"{name}, seed {seed}: {rows[-1]['accuracy']:.3f} ({time.time() - start:.0f} s)")


def reached(rows: list[dict], share: float) -> int | None:
    return min((row["step"] for row in rows if row["accuracy"] >= share), default=None)


def report(ledger: Ledger, folder: Path, steps: int, seeds: int) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in ledger.rows if row["step"] <= steps and row["seed"] < seeds]
    off = [row | {"name": "Engram, switched off", "accuracy": row["off"]} for row in rows if "off" in row]
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves(axes, rows + off, "step", "accuracy", [*models(), "Engram, switched off"])
    axes.set(xlabel="steps of 512 facts", ylabel="facts known", ylim=(0, 1.02))
    axes.set_title(f"4,096 facts by heart; bands: least and most of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(folder / "facts.png", dpi=130)
    lines = ["| model | parameters | known at the end | ± | steps to 0.5 | to 0.9 |", "|---|---:|---:|---:|---|---|"]
    for name in (*models(), "Engram, switched off"):
        mine = [[r for r in rows + off if r["name"] == name and r["seed"] == seed] for seed in range(seeds)]
        last = [run[-1]["accuracy"] for run in mine]
        spread = np.std(last, ddof=1) if len(last) > 1 else 0.0
        when = [", ".join(str(reached(run, share) or "never") for run in mine) for share in (0.5, 0.9)]
        model = models().get(name)
        count = ""
        if model is not None:
            shapes = jax.eval_shape(lambda model=model: model.build(rngs=nnx.Rngs(0)))
            count = f"{parameter_count(flatten(shapes)[1].specs):,}"
        lines.append(f"| {name} | {count} | {np.mean(last):.3f} | {spread:.3f} | {when[0]} | {when[1]} |")
    (folder / "study.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    door(__doc__, study, report, Path("results/engram"))
