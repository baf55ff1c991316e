"""The same run on every mesh: losses of twenty steps, layer by layer, on eight devices against one.

    python -m benchmarks.meshes                 writes results/meshes/: meshes.md; runs.jsonl, the losses of each run
    python -m benchmarks.meshes --layers Titans GatedDeltaNet --folder runs/meshes       a look

Eight fake devices of this machine's CPU, float32. One layer of each kind, with an MLP behind it, width 64; eight rows
of 64 tokens a step, documents and padding among them; Adam. What is in the ledger is not trained again.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import layers
from layers.layer import LayerConfig
from layers.mlp import MLP
from models.lm import LM, Stage
from training.data import Batch, DataConfig, Dataset
from training.experiment import AdamW, Experiment, Mesh, Schedule
from training.run import prepare

WORDS, T, B, STEPS, CLOSE = 50, 64, 8, 20, 1e-5
MESHES = {
    "one device": Mesh(data=1),
    "data 8": Mesh(data=8),
    "fsdp 8": Mesh(fsdp=8),
    "sequence 8": Mesh(sequence=8),
    "model 8": Mesh(model=8),
    "fsdp 2, sequence 2, model 2": Mesh(fsdp=2, sequence=2, model=2),
}


@dataclasses.dataclass(frozen=True)
class Words(DataConfig):
    """Rows of words drawn at random, in documents, some padding between them."""

    T: int = T
    B: int = B

    def build(self) -> "WordsDataset":
        return WordsDataset()


class WordsDataset(Dataset):
    words, digest, token_bytes = WORDS, "words", np.ones(WORDS, np.int32)

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        rng = np.random.default_rng((seed, step))
        ids, labels = rng.integers(0, WORDS, (2, B, T), np.int32)
        starts = rng.random((B, T)) < 1 / 20
        starts[:, 0] = True
        place = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), 1)
        pos = np.where(place < 30, place, -1).astype(np.int32)  # a long document's end is padding
        return Batch(ids, pos, np.where(pos < 0, -100, labels).astype(np.int32))

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        yield self.batch(1, 0)


def losses(mixer: LayerConfig, mesh: Mesh, double: bool = False) -> list[float]:
    model = LM(W=WORDS, D=64, stages=(Stage((mixer, MLP(F=64))),))
    # An eps that differences of rounding in the gradient do not pass.
    adam = AdamW(lr=1e-2, eps=1e-2, schedule=Schedule(warmup=0, shape="constant"))
    job = prepare(Experiment("Losses.", model, Words(), adam, mesh=mesh))
    state, said, batch = job.init(), [], job.dataset.batch(0, 0)  # always the same, to be learnt by heart
    with jax.enable_x64(double):
        if double:
            state = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)
        for _ in range(STEPS):
            state, metrics = job.step(state, batch)
            said.append(float(metrics["loss"]))
    return said


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each layer, how far the loss of any step is from that of one device, at most, relative to it."""
    names = [name for name in MESHES if name != "one device"]
    lines = [f"| layer | loss, step 1 to {STEPS} | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    for layer in dict.fromkeys(row["layer"] for row in rows):
        of = {row["mesh"]: np.array(row["losses"]) for row in rows if row["layer"] == layer}
        if set(of) < set(MESHES):
            continue
        alone = of["one device"]
        far = [float(np.max(np.abs(of[name] - alone) / alone)) for name in names]
        cells = " | ".join(f"{d:.0e}" if d <= CLOSE else f"**{d:.0e}**" for d in far)
        lines.append(f"| {layer} | {alone[0]:.3f} to {alone[-1]:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--layers", nargs="+", default=None, help="names of classes; default: all")
    about.add_argument("--folder", type=Path, default=Path("results/meshes"))
    about.add_argument("--double", action="store_true", help="in float64, in a folder of its own")
    asked = about.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing has asked for devices yet
    jax.config.update("jax_num_cpu_devices", 8)
    asked.folder.mkdir(parents=True, exist_ok=True)
    ledger = asked.folder / "runs.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    known = {(row["layer"], row["mesh"]) for row in rows}
    classes = {cls.__name__: cls for cls in layers.discover()}
    if unknown := set(asked.layers or ()) - set(classes):
        about.error(f"no layer is named {', '.join(sorted(unknown))}: they are {', '.join(sorted(classes))}")
    for layer, cls in classes.items():
        for name, mesh in MESHES.items():
            if (layer, name) in known or (asked.layers and layer not in asked.layers):
                continue
            row = {"layer": layer, "mesh": name, "losses": losses(cls.examples()[0], mesh, asked.double)}
            rows.append(row)
            with ledger.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{layer}, {name}: {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}", flush=True)
    (asked.folder / "meshes.md").write_text(page(rows))


if __name__ == "__main__":
    main()
