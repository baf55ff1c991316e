"""The same run on every mesh: losses of twenty steps, layer by layer, on eight devices against one.

    python -m benchmarks.meshes                 writes results/meshes/: meshes.md; runs.jsonl, the losses of each run
    python -m benchmarks.meshes --processes 2   the same of two processes with four devices each, on one mesh
    python -m benchmarks.meshes --configs       what every config begins with, on every mesh: parameters.md and .jsonl
    python -m benchmarks.meshes --layers Titans GatedDeltaNet --folder runs/meshes       a look

Eight fake devices of this machine's CPU, float32. One layer of each kind, with an MLP behind it, width 64; eight rows
of 64 tokens a step, documents and padding among them; Adam. What is in the ledger is not trained again.
"""

import argparse
import dataclasses
import hashlib
import json
import pkgutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import configs
import layers
from layers.layer import LayerConfig
from layers.mlp import MLP
from models.lm import LM, Stage
from training import processes, settings
from training.data import Batch, DataConfig, Dataset
from training.experiment import AdamW, Experiment, Mesh, Schedule
from training.flags import Processes
from training.layout import build_layout
from training.program import build_program
from training.run import prepare

WORDS, T, B, STEPS, CLOSE = 50, 64, 8, 20, 1e-5
DEVICES = 8
MESHES = {
    "one device": Mesh(data=1),
    "data 8": Mesh(data=8),
    "fsdp 8": Mesh(fsdp=8),
    "sequence 8": Mesh(sequence=8),
    "model 8": Mesh(model=8),
    "fsdp 2, sequence 2, model 2": Mesh(fsdp=2, sequence=2, model=2),
}
OVER_PROCESSES = "fsdp 2, sequence 2, model 2"
Rows = list[dict[str, Any]]


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
        labels = np.where(pos < 0, -100, labels).astype(np.int32)
        return Batch(*(array[rows or slice(None)] for array in (ids, pos, labels)))

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        yield self.batch(1, 0)


def losses(mixer: LayerConfig, mesh: Mesh, double: bool = False) -> list[float]:
    model = LM(W=WORDS, D=64, stages=(Stage((mixer, MLP(F=64))),))
    # An eps that differences of rounding in the gradient do not pass.
    adam = AdamW(lr=1e-2, eps=1e-2, schedule=Schedule(warmup=0, shape="constant"))
    job = prepare(Experiment("Losses.", model, Words(), adam, mesh=mesh))
    batch = job.feed(job.dataset.batch(0, 0, job.share))  # always the same, to be learnt by heart
    state, said = job.init(), []
    with jax.enable_x64(double):
        if double:
            state = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)
        for _ in range(STEPS):
            state, metrics = job.step(state, batch)
            said.append(float(metrics["loss"]))
    return said


def first_parameters(name: str, mesh: Mesh) -> str:
    """A hash of all that a config begins with, to the bit."""
    experiment = dataclasses.replace(settings.load(settings.locate(name)), mesh=mesh)
    layout = build_layout(mesh, experiment.data.B, experiment.data.T)
    params = build_program(experiment, experiment.data.build(), layout).init()["params"]
    total = hashlib.sha256()
    for parameter in sorted(params):
        total.update(parameter.encode() + np.asarray(params[parameter]).tobytes())
    return total.hexdigest()


def page(rows: Rows) -> str:
    """Markdown: of each layer, how far the loss of any step is from that of one device, at most, relative to it."""
    names = [name for name in dict.fromkeys(row["mesh"] for row in rows) if name != "one device"]
    lines = [f"| layer | loss, step 1 to {STEPS} | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    for layer in sorted({row["layer"] for row in rows}):
        of = {row["mesh"]: np.array(row["losses"]) for row in rows if row["layer"] == layer}
        if set(of) < set(MESHES):
            continue
        alone = of["one device"]
        far = [float(np.max(np.abs(of[name] - alone) / alone)) if name in of else None for name in names]
        cells = " | ".join("" if d is None else f"{d:.0e}" if d <= CLOSE else f"**{d:.0e}**" for d in far)
        lines.append(f"| {layer} | {alone[0]:.3f} to {alone[-1]:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def parameters_page(rows: Rows) -> str:
    """Markdown: of each config, the hash of its first parameters, and on how many meshes it is that."""
    lines = ["| config | SHA-256 of the first parameters | meshes with it |", "|---|---|---:|"]
    for config in sorted({row["config"] for row in rows}):
        hashes = [row["parameters"] for row in rows if row["config"] == config]
        for one in dict.fromkeys(hashes):
            lines.append(f"| {config} | `{one[:16]}` | {hashes.count(one)} of {len(hashes)} |")
    return "\n".join(lines) + "\n"


class Ledger:
    """Rows of JSON in a file, of what is done: one for each (subject, mesh)."""

    def __init__(self, path: Path, subject: str, writes: bool = True):
        self.path, self.subject, self.writes = path, subject, writes
        self.rows: Rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, name: str, mesh: str) -> bool:
        return any(row[self.subject] == name and row["mesh"] == mesh for row in self.rows)

    def add(self, name: str, mesh: str, said: str, **more: Any) -> None:
        row = {self.subject: name, "mesh": mesh, **more}
        self.rows.append(row)
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, {mesh}: {said}", flush=True)


def apart(count: int) -> int:
    """This command in `count` processes over loopback; the exit status of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.meshes", *sys.argv[1:], "--coordinator", place, "--index"]
    started = [subprocess.Popen([*command, str(index)]) for index in range(count)]
    return next((status for status in [process.wait() for process in started] if status), 0)


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--layers", nargs="+", default=None, help="names of classes; default: all")
    about.add_argument("--folder", type=Path, default=Path("results/meshes"))
    about.add_argument("--double", action="store_true", help="in float64, in a folder of its own")
    about.add_argument("--processes", type=int, default=1, help=f"that share the {DEVICES} devices")
    about.add_argument("--configs", action="store_true", help="what every config begins with, instead of losses")
    about.add_argument("--coordinator", help=argparse.SUPPRESS)
    about.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    asked = about.parse_args()
    count = asked.processes
    if count < 1 or DEVICES % count:
        about.error(f"--processes is {count}: it must divide the {DEVICES} devices")
    if count > 1 and asked.configs:
        about.error("--configs is of one process")
    classes = {cls.__name__: cls for cls in layers.discover()}
    if unknown := set(asked.layers or ()) - set(classes):
        about.error(f"no layer is named {', '.join(sorted(unknown))}: they are {', '.join(sorted(classes))}")
    if count > 1 and asked.coordinator is None:
        return apart(count)
    jax.config.update("jax_platforms", "cpu")  # nothing has asked for devices yet
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    if count > 1:
        processes.start(Processes(asked.coordinator, count, asked.index))
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.configs:
        ledger = Ledger(asked.folder / "parameters.jsonl", "config")
        for config in (found.name for found in pkgutil.iter_modules(configs.__path__) if not found.ispkg):
            for name, mesh in MESHES.items():
                if not ledger.has(config, name):
                    one = first_parameters(config, mesh)
                    ledger.add(config, name, one[:16], parameters=one)
        (asked.folder / "parameters.md").write_text(parameters_page(ledger.rows))
        return 0
    ledger = Ledger(asked.folder / "runs.jsonl", "layer", writes=asked.index == 0)
    meshes = MESHES
    if count > 1:
        meshes = {f"{OVER_PROCESSES}: {count} processes x {DEVICES // count}": MESHES[OVER_PROCESSES]}
    missing = [
        (layer, name)
        for layer in classes
        for name in meshes
        if not ledger.has(layer, name) and (not asked.layers or layer in asked.layers)
    ]
    for layer, name in missing:
        of = losses(classes[layer].examples()[0], meshes[name], asked.double)
        ledger.add(layer, name, f"{of[0]:.4f} to {of[-1]:.4f}", losses=of)
    if asked.index == 0:
        (asked.folder / "meshes.md").write_text(page(ledger.rows))
    return 0


if __name__ == "__main__":
    sys.exit(processes.finish(main()))
