"""What an arm of a study costs, by how many train together: MQAR over 8,192 words, as Zoology's smallest setting.

    python -m benchmarks.grid_speed            writes results/grid_speed/: grid.md, grid.png
    python -m benchmarks.grid_speed --arms 1 4 --steps 3 --folder runs/grid_speed      a look

Rows of 64 tokens with 4 pairs, 256 a step; width 64, a gated convolution and the mixer, no MLP. Arms are four learning
rates by as many seeds as it takes. CPU seconds and wall seconds are of steps alone, medians; compiling is told apart.
Zoology takes 2.1 CPU seconds a step of one such model (commit dbcb60d, torch 2.13, one thread, all places projected).
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from layers.attention import Attention
from layers.gated_deltanet import GatedDeltaNet
from layers.layer import LayerConfig
from probes.ablation import build
from probes.matrix import both, picture
from probes.study import Numbers
from probes.tasks.recall import MQAR
from probes.tasks.task import Part, Probe, Trial
from probes.trial import experiment
from training.heap import keep_heap

LAW = MQAR(vocab=8192, length=64, pairs=4)
ZOOLOGY = 2.1  # CPU seconds a step of one arm
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
MIXERS: dict[str, LayerConfig] = {"attention": Attention(H=1, rope_theta=None), "Gated DeltaNet": GatedDeltaNet(H=2)}


def measured(mixer: LayerConfig, count: int, steps: int) -> dict[str, float]:
    """Of a program of so many arms: seconds to compile, and CPU and wall seconds of a step, medians."""
    data = Probe(B=256, train=(Part(LAW),), test=(Part(LAW, 256),))
    base = experiment(mixer, Trial(data, steps=steps + 1))
    arms = [Numbers(seed, rate) for seed, rate in itertools.product(range(-(-count // 4)), RATES)][:count]
    start = time.perf_counter()
    run = build(base, arms).train()
    jax.block_until_ready(next(run)[1])
    compiled = time.perf_counter() - start
    cpu, wall = [], []
    for _ in range(steps):
        before = time.process_time(), time.perf_counter()
        _, state, _ = next(run)
        jax.block_until_ready(state)
        cpu.append(time.process_time() - before[0])
        wall.append(time.perf_counter() - before[1])
    return {"compile": compiled, "cpu": statistics.median(cpu), "wall": statistics.median(wall)}


def drawn(rows: list[dict[str, Any]]) -> Any:
    def draw(dark: bool) -> Figure:
        figure = Figure(figsize=(7.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(MIXERS):
            mine = [row for row in rows if row["mixer"] == name]
            x, y = [row["arms"] for row in mine], [row["arms"] / row["wall"] for row in mine]
            axes.plot(x, y, marker="os"[number], label=name)
            axes.annotate(name, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.axhline(1 / ZOOLOGY, ls=":", lw=1, color="#888888")
        axes.annotate("Zoology, one core", (1, 1 / ZOOLOGY), xytext=(0, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log", base=2)
        ticks = sorted({row["arms"] for row in rows})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlim(0.9, ticks[-1] * 2.2)
        axes.set_ylim(0)
        axes.set_xlabel("arms in a program")
        axes.set_ylabel("arm-steps a second")
        axes.set_title("MQAR, 8,192 words: steps of all arms together")
        return figure

    return draw


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| memory | arms | CPU s an arm and step | beside Zoology's 2.1 | arm-steps a second | compile, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        each = row["cpu"] / row["arms"]
        lines.append(
            f"| {row['mixer']} | {row['arms']} | {each:.3f} | {ZOOLOGY / each:.1f}x less | "
            f"{row['arms'] / row['wall']:.1f} | {row['compile']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results/grid_speed"))
    parser.add_argument("--arms", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="programs of so many arms")
    parser.add_argument("--steps", type=int, default=7, help="timed of each program (default 7)")
    options = parser.parse_args()
    keep_heap()
    rows = []
    for name, mixer in MIXERS.items():
        for count in options.arms:
            rows.append({"mixer": name, "arms": count, **measured(mixer, count, options.steps)})
            print(json.dumps(rows[-1]), flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    both(drawn(rows), options.folder / "grid")
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    shown = picture("grid", "arm-steps a second by arms in a program")
    arms = " ".join(map(str, options.arms))
    command = f"`python -m benchmarks.grid_speed --arms {arms} --steps {options.steps}`"
    text = f"# Arms together\n\n{shown}\n\n{table(rows)}\n\n{command}, {device}\n"
    (options.folder / "grid.md").write_text(text)


if __name__ == "__main__":
    main()
