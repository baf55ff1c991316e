"""What test-time memories recall, and what each part of them is for: overwrite recall, three seeds.

    python -m probes.memory_study                   writes results/test_time/: study.jsonl, study.md and three pictures
    python -m probes.memory_study --seeds 1 --steps 50 --folder runs/study      a look
    python -m probes.memory_study --figure parts      one of the four: two processes, a core each, share the work

A model is trained once for all seeds at once; what is in study.jsonl already is not trained again, so that a study that
was stopped goes on. About 40 minutes on one core.
"""

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from layers.attention import Attention
from layers.gated_conv import GatedConv
from layers.layer import LayerConfig, Tokens
from layers.memory_as_gate import MemoryAsGate
from layers.test_time import TestTimeMemory, Unstable
from layers.titans import Titans
from models.lm import LM, Stage
from models.parameters import flatten
from probes.grid import Arm, Grid
from probes.tasks.overwrite import Overwrite
from probes.tasks.task import Part, Probe, ProbeData
from training.data import NOT_ASKED
from training.experiment import AdamW, Schedule, Train

WINDOW, LENGTHS, STEP = 4, (64, 128, 256, 512), 0.25
LAW, ROWS = Overwrite(vocab=16, length=64, keys=4), 128
FIGURES = "length", "parts", "chunk", "crossed"
# A key that is told anew is to be answered anew: steps as long as chunks of 4 tokens bear with momentum up to a half.
TITANS = Titans(H=2, chunk=4, momentum_max=0.5, lr_max=STEP)
LINEAR = TestTimeMemory(H=2, chunk=4, momentum_max=0.5, depth=1, norm=False)
EXACT = dataclasses.replace(LINEAR, exact=True, chunk=16)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A mixer that is trained, and the chunks at which it is then asked (its own when there are none)."""

    figure: str
    name: str
    mixer: LayerConfig
    chunks: tuple[int, ...] = ()
    lengths: tuple[int, ...] = (64,)


def variants() -> list[Variant]:
    far = [
        Variant("length", f"attention, window {WINDOW}", Attention(H=2, window=WINDOW), lengths=LENGTHS),
        Variant("length", "Titans", TITANS, lengths=LENGTHS),
        Variant("length", "linear, exact", EXACT, lengths=LENGTHS),
        Variant("length", "Titans as gate", MemoryAsGate(Attention(H=2, window=WINDOW), TITANS), lengths=LENGTHS),
    ]
    parts: dict[str, dict[str, Any]] = {
        "no momentum": {"momentum": False},
        "no decay": {"keep": False},
        "one matrix": {"depth": 1},
        "no convolution": {"conv": 0},
    }
    ablations = [Variant("parts", name, dataclasses.replace(TITANS, **change)) for name, change in parts.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Unstable)  # what happens then is the question
        anchors = [
            Variant("chunk", f"linear, chunk {C}{said}", dataclasses.replace(LINEAR, chunk=C, lr_max=step))
            for said, step, chunks in (("", None, (2, 4, 8, 16, 32)), (f", lr_max {STEP}", STEP, (8, 32)))
            for C in chunks
        ]
        crossed = [
            Variant("crossed", f"trained at {C}", dataclasses.replace(TITANS, chunk=C), (2, 4, 8, 16, 32))
            for C in (4, 16)
        ]
    return far + ablations + anchors + crossed


def model_of(mixer: LayerConfig, vocab: int) -> LM:
    """A gated convolution, which joins each key and its value, then the mixer."""
    return LM(W=vocab, D=32, stages=(Stage((GatedConv(), mixer)),), tied=True)


def trained(variant: Variant, data: ProbeData, steps: int, seeds: int) -> tuple[dict[str, Any], np.ndarray]:
    """Parameters of all seeds, stacked, and the loss of each step [steps, seeds]."""
    optimizer = AdamW(lr=1e-2, schedule=Schedule(warmup=10, shape="cosine", final=0.0))
    grid = Grid(
        model_of(variant.mixer, data.words), data, optimizer, Train(steps=steps), [Arm(seed) for seed in range(seeds)]
    )
    losses: list[np.ndarray] = []
    for _, state, loss_A in grid.train():  # noqa: B007  (the last one is wanted)
        losses.append(np.asarray(loss_A))
    return state["params"], np.stack(losses)


def asked(mixer: LayerConfig, params: dict[str, Any], data: ProbeData, T: int) -> list[dict[str, Any]]:
    """By seed: the share of questions answered right, over all and by the distance since the key was told."""
    structure = flatten(jax.eval_shape(lambda: model_of(mixer, data.words).build(rngs=nnx.Rngs(0))))[1]

    @jax.jit
    def likeliest(params: dict[str, Any], ids: Any, pos: Any) -> Any:
        return jax.vmap(lambda p: jnp.argmax(structure.module(p)(Tokens(ids, pos)).y_BTD, -1))(params)

    right = []
    law = dataclasses.replace(LAW, length=T)
    distance = law.rows(law.test_seed(), np.arange(ROWS)).about["distance"]
    distance = distance[distance >= 0]
    for batch in data.questions(Part(law, ROWS)):
        answers = np.asarray(likeliest(params, batch.ids_BT, batch.pos_BT))
        labels = np.asarray(batch.labels_BT)
        right.append((answers == labels[None])[:, labels != NOT_ASKED])
    hits = np.concatenate(right, 1)
    edges = [2, 8, 16, 32, 64, 128]
    spans = [(low, (distance > low) & (distance <= high)) for low, high in zip([0, *edges], edges, strict=False)]
    bins = [(str(low), mask) for low, mask in spans if mask.any()]
    return [
        {"accuracy": float(row.mean()), "by_gap": {low: float(row[mask].mean()) for low, mask in bins}} for row in hits
    ]


def study(
    folder: Path, steps: int, seeds: int, console: Console, figures: tuple[str, ...] = FIGURES
) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    data = Probe(B=16, train=(Part(LAW),), test=(Part(LAW, ROWS),)).build()
    todo = [variant for variant in variants() if variant.figure in figures]
    for n, variant in enumerate(todo, 1):
        key = {"figure": variant.figure, "name": variant.name, "steps": steps, "seeds": seeds}
        if any(key.items() <= row.items() for row in known):
            continue
        start = time.time()
        params, losses = trained(variant, data, steps, seeds)
        own = getattr(variant.mixer, "chunk", 0)
        for chunk in variant.chunks or (own,):
            mixer: Any = variant.mixer
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Unstable)  # what happens then is the question
                mixer = dataclasses.replace(mixer, chunk=chunk) if variant.chunks else mixer
            for T in variant.lengths:
                for seed, score in enumerate(asked(mixer, params, data, T)):
                    row = {
                        **key,
                        "chunk": chunk,
                        "T": T,
                        "seed": seed,
                        **score,
                        "loss": float(losses[-10:, seed].mean()),
                    }
                    known.append(row)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        last = [row for row in known if key.items() <= row.items()]
        scores = ", ".join(f"{row['accuracy']:.3f}" for row in last[:seeds])
        console.print(f"{n}/{len(todo)} {variant.figure}: {variant.name}: {scores} ({time.time() - start:.0f} s)")
    return [row for row in known if row["steps"] == steps and row["seeds"] == seeds]


def mean_and_spread(rows: list[dict[str, Any]]) -> tuple[float, float]:
    values = [row["accuracy"] for row in rows]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def pictures(rows: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(figure: str, x: str) -> dict[str, list[tuple[int, float, float]]]:
        found: dict[str, list[tuple[int, float, float]]] = {}
        for row in rows:
            if row["figure"] == figure and row["seed"] == 0:
                same = [r for r in rows if all(r[k] == row[k] for k in ("figure", "name", "T", "chunk"))]
                found.setdefault(row["name"], []).append((row[x], *mean_and_spread(same)))
        return found

    def save(name: str, draw: Callable[[Any], None], xlabel: str, title: str, width: float = 6.4) -> None:
        figure, axes = plt.subplots(figsize=(width, 4))
        draw(axes)
        axes.set(ylabel="questions answered right", xlabel=xlabel, title=title)
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=130)
        plt.close(figure)

    def lines(found: dict[str, list[tuple[int, float, float]]]) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for name, points in found.items():
                x, y, spread = zip(*sorted(points), strict=True)
                axes.errorbar(x, y, spread, marker="o", capsize=3, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({p[0] for points in found.values() for p in points}))
            axes.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axes.set_ylim(0, 1)
            if found:
                axes.legend()

        return draw

    length = series("length", "T")
    save(
        "length.png", lines(length), "length of the row (trained at 64)", "Overwrite recall beyond the training length"
    )
    save(
        "crossed.png",
        lines(series("crossed", "chunk")),
        "chunk when asked",
        "Titans trained at one chunk, asked at others",
    )

    def bars(axes: Any) -> None:
        whole = [r for r in rows if r["figure"] == "length" and r["T"] == 64]
        exact = [r for r in whole if r["name"] == "linear, exact"]
        titans = [r for r in whole if r["name"] == "Titans"]
        groups = [("Titans", titans), *_by_name(rows, "parts"), ("linear, exact", exact), *_by_name(rows, "chunk")]
        groups = [(name, members) for name, members in groups if members]
        for i, (name, members) in enumerate(groups):
            mean, spread = mean_and_spread(members)
            axes.bar(i, mean, yerr=spread, capsize=3, color="C1" if name.startswith("linear") else "C0")
        axes.set_xticks(range(len(groups)), [name for name, _ in groups], rotation=35, ha="right")
        axes.set_ylim(0, 1)

    save("parts.png", bars, "", "Parts of a memory switched off; exact against frozen anchors", 8.5)


def _by_name(rows: list[dict[str, Any]], figure: str) -> list[tuple[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["figure"] == figure:
            found.setdefault(row["name"], []).append(row)
    return list(found.items())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| figure | model | chunk | length | right | ± | by distance since the key was told |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    seen = set()
    for row in rows:
        key = (row["figure"], row["name"], row["chunk"], row["T"])
        if key in seen:
            continue
        seen.add(key)
        same = [r for r in rows if (r["figure"], r["name"], r["chunk"], r["T"]) == key]
        mean, spread = mean_and_spread(same)
        by_gap = {low: np.mean([r["by_gap"][low] for r in same if low in r["by_gap"]]) for low in row["by_gap"]}
        text = ", ".join(f"above {low}: {share:.2f}" for low, share in by_gap.items())
        lines.append(f"| {key[0]} | {key[1]} | {key[2] or ''} | {key[3]} | {mean:.3f} | {spread:.3f} | {text} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/test_time"))
    parser.add_argument("--steps", type=int, default=300, help="of training, 16 rows of 64 tokens each (default 300)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", choices=FIGURES, action="append", help="train for this one only; more than once")
    options = parser.parse_args()
    console = Console()
    rows = study(options.folder, options.steps, options.seeds, console, tuple(options.figure or FIGURES))
    pictures(rows, options.folder)
    (options.folder / "study.md").write_text(table(rows) + "\n")
    console.print(f"wrote {options.folder}/study.md, length.png, parts.png, crossed.png")


if __name__ == "__main__":
    main()
