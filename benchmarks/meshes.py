"""The same run on every mesh: losses of twenty steps, layer by layer, on eight devices against one.

    python -m benchmarks.meshes                 writes results/meshes/: meshes.md; runs.jsonl, the losses of each run
    python -m benchmarks.meshes --processes 2   the same of two processes with four devices each, on one mesh
    python -m benchmarks.meshes --configs       what every config begins with, on every mesh: parameters.md and .jsonl
    python -m benchmarks.meshes --layers Titans GatedDeltaNet --folder runs/meshes       a look
    python -m benchmarks.meshes --layers GLA --change norm_eps 1e-6 --folder runs/eps    at another value of a field

Eight fake devices of this machine's CPU, float32. One layer of each kind, with an MLP behind it, width 64; eight rows
of 64 tokens a step, documents and padding among them; Adam. What is in the ledger is not trained again.
"""

import argparse
import dataclasses
import hashlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import layers
from layers.layer import LayerConfig
from layers.mlp import MLP
from models.lm import LM, Stage
from probes.small_runs import Ledger
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


def first_parameters(config: Path, mesh: Mesh) -> str:
    """A hash of all that a config begins with, to the bit."""
    experiment = dataclasses.replace(settings.load(config), mesh=mesh)
    layout = build_layout(mesh, experiment.data.B, experiment.data.T)
    params = build_program(experiment, experiment.data.build(), layout).init()["params"]
    total = hashlib.sha256()
    for parameter in sorted(params):
        total.update(parameter.encode() + np.asarray(params[parameter]).tobytes())
    return total.hexdigest()


def page(rows: Rows) -> str:
    """Markdown: of each layer, how far the loss of any step is from that of one device, at most, relative to it."""
    names = [name for name in dict.fromkeys([*MESHES, *(row["mesh"] for row in rows)]) if name != "one device"]
    lines = [f"| layer | loss, step 1 to {STEPS} | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    for layer in sorted({row["layer"] for row in rows}):
        of = {row["mesh"]: np.array(row["losses"]) for row in rows if row["layer"] == layer}
        if not set(MESHES) <= set(of):
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


def apart(count: int) -> int:
    """This command in `count` processes over loopback; the exit status of the first that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "benchmarks.meshes", *sys.argv[1:], "--coordinator", place, "--index"]
    started = [subprocess.Popen([*command, str(index)]) for index in range(count)]
    try:
        return next((status for status in [process.wait() for process in started] if status), 0)
    finally:
        for process in started:
            process.kill()


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--layers", nargs="+", default=None, help="names of classes; default: all")
    about.add_argument("--folder", type=Path, default=Path("results/meshes"))
    about.add_argument("--double", action="store_true", help="in float64, in a folder of its own")
    about.add_argument("--change", nargs=2, metavar=("FIELD", "NUMBER"), help="of --layers, in a folder of its own")
    about.add_argument("--processes", type=int, default=1, help=f"that share the {DEVICES} devices")
    about.add_argument("--configs", action="store_true", help="what every config begins with, instead of losses")
    about.add_argument("--coordinator", help=argparse.SUPPRESS)
    about.add_argument("--index", type=int, default=0, help=argparse.SUPPRESS)
    asked = about.parse_args()
    count = asked.processes
    if count < 1 or DEVICES % count:
        about.error(f"--processes is {count}: it must divide the {DEVICES} devices")
    if asked.configs and (count > 1 or asked.layers or asked.double):
        about.error("--configs goes with --folder alone")
    if (asked.double or asked.change) and asked.folder == about.get_default("folder"):
        about.error("--double and --change need a --folder of their own")
    classes = {cls.__name__: cls for cls in layers.discover()}
    if asked.change and not asked.layers:
        about.error("--change needs --layers that have the field")
    if unknown := set(asked.layers or ()) - set(classes):
        about.error(f"no layer is named {', '.join(sorted(unknown))}: they are {', '.join(sorted(classes))}")
    try:
        mixers = {name: cls.examples()[0] for name, cls in classes.items()}
        for name in asked.layers if asked.change else ():
            mixers[name] = settings.replaced(mixers[name], asked.change[0], float(asked.change[1]))
    except ValueError as error:  # a number that is none, too
        about.error(f"--change: {error}")
    if count > 1 and asked.coordinator is None:
        return apart(count)
    jax.config.update("jax_platforms", "cpu")  # nothing has asked for devices yet
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    if count > 1:
        processes.start(Processes(asked.coordinator, count, asked.index))
    with processes.ended_together():
        if asked.configs:
            hash_configs(asked.folder)
        else:
            train(asked, mixers)
    return 0


def hash_configs(folder: Path) -> None:
    ledger = Ledger(folder / "parameters.jsonl")
    for config, path in settings.config_files().items():
        for name, mesh in MESHES.items():
            if not ledger.has(config=config, mesh=name):
                one = first_parameters(path, mesh)
                ledger.add(config=config, mesh=name, parameters=one)
                print(f"{config}, {name}: {one[:16]}", flush=True)
    (folder / "parameters.md").write_text(parameters_page(ledger.rows))


def train(asked: argparse.Namespace, mixers: dict[str, LayerConfig]) -> None:
    count, first = asked.processes, asked.index == 0
    ledger = Ledger(asked.folder / "runs.jsonl", writable=first)
    meshes = MESHES
    if count > 1:
        meshes = {f"{OVER_PROCESSES}: {count} processes x {DEVICES // count}": MESHES[OVER_PROCESSES]}
    told = {layer: hashlib.sha256(str(mixer).encode()).hexdigest()[:12] for layer, mixer in mixers.items()}
    missing = [
        (layer, name)
        for layer in asked.layers or mixers
        for name in meshes
        if not ledger.has(layer=layer, mesh=name, config=told[layer])
    ]
    for layer, name in missing:
        of = losses(mixers[layer], meshes[name], asked.double)
        if first:
            ledger.add(layer=layer, mesh=name, config=told[layer], losses=of)
            print(f"{layer}, {name}: {of[0]:.4f} to {of[-1]:.4f}", flush=True)
    if first:
        now = [row for row in ledger.rows if row.get("config") == told.get(row["layer"])]
        (asked.folder / "meshes.md").write_text(page(now))


if __name__ == "__main__":
    sys.exit(processes.finish(main()))
