"""A training step of associative recall, beside Zoology's, in one run.

    python -m benchmarks.recall_peers --zoology CHECKOUT --python PYTHON [--train] [--rounds 7] [--json FILE]

CHECKOUT is a clone of https://github.com/HazyResearch/zoology at dbcb60d (the commit after it cannot train a model of
tokens). PYTHON is an interpreter of its own, with what Zoology needs on a CPU:

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 einops numpy pandas pydantic tqdm

torchvision and wandb are imported there and not used: stand-ins take their place.

Both sides train the same model on the same rows: width 64, a gated short convolution, then attention with one head; no
MLP, tied head, 256 rows of 64 tokens with 4 pairs; AdamW. What differs is each one's own: Zoology drops out embeddings
and attention weights (0.1), adds its normalised stream once more after each layer where an MLP would be, and projects
every place to the vocabulary; we project the labelled ones (and, beside that, every place too). benchmarks/pair.py says
how times are taken. `--train` also trains both to 99% (rows of a 256-word vocabulary, held-out accuracy every 79 steps,
20,000 rows an epoch).
"""

import argparse
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pair import Contestant, Loaded, interleave, pin, serve

if __name__ == "__main__" and "--serve" in sys.argv:
    pin()

import numpy as np

from probes.tasks.recall import MQAR
from probes.tasks.task import Part, Probe

MODULE = "benchmarks.recall_peers"
VOCABS = (256, 8192)
GOALS = {256: 0.5, 8192: 0.1}  # of the peer's CPU time
LENGTH, PAIRS, ROWS, WIDTH, RATE = 64, 4, 256, 64, 1e-2
EPOCH, TARGET, MOST_EPOCHS = 79, 0.99, 8


class Trainee(NamedTuple):
    """A model in training."""

    step: Callable[[np.ndarray, np.ndarray], float]  # (ids, labels) -> loss, the model having learned from it
    answers: Callable[
        [np.ndarray, np.ndarray], np.ndarray
    ]  # (ids, labels) -> the likeliest word at each place or label


def data(vocab: int) -> Probe:
    law = MQAR(vocab=vocab, length=LENGTH, pairs=PAIRS, filler="conflict_free")
    return Probe(B=ROWS, train=(Part(law, 20_000),), test=(Part(law, 1_024),))


def ours(vocab: int, labelled: int | None = PAIRS) -> Trainee:
    import jax
    from flax import nnx

    from layers.attention import Attention
    from layers.gated_conv import GatedConv
    from layers.layer import Tokens
    from models.lm import LM, Stage
    from models.parameters import flatten
    from training.data import Batch
    from training.experiment import AdamW, Experiment, Schedule, Train
    from training.heap import keep_heap
    from training.optimizer import build_optimizer
    from training.step import init_state, train_step

    keep_heap()  # as every run of ours on CPU does
    config = data(vocab)
    dataset = config.build()
    experiment = Experiment(
        description="the same model as Zoology's",
        model=LM(W=vocab, D=WIDTH, stages=(Stage((GatedConv(), Attention(H=1, rope_theta=None))),), tied=True),
        data=config,
        optimizer=AdamW(lr=RATE, schedule=Schedule(warmup=0, shape="constant")),
        train=Train(steps=EPOCH * MOST_EPOCHS),
    )
    params, structure = flatten(experiment.model.build(rngs=nnx.Rngs(0)))
    optimizer = build_optimizer(experiment.optimizer, experiment.train.steps, experiment.train.clip, structure.specs)
    run = train_step(experiment, structure, optimizer, dataset.token_bytes, labelled)
    run = jax.jit(run, donate_argnums=0)
    state = init_state(experiment, params, optimizer)
    place_BT = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))

    def step(ids: np.ndarray, labels: np.ndarray) -> float:
        nonlocal state
        state, metrics = run(state, Batch(ids, place_BT, labels))
        return float(metrics["loss"])

    @jax.jit
    def likeliest(params, ids, place):
        return jax.numpy.argmax(structure.module(params)(Tokens(ids, place)).y_BTD, -1)

    return Trainee(step, lambda ids, labels: np.asarray(likeliest(state["params"], ids, place_BT)))


def zoology(checkout: str, vocab: int) -> Trainee:
    import torch

    class NoDrop(torch.nn.Module):
        """torchvision's StochasticDepth at probability 0."""

        def __init__(self, p: float, mode: str):
            super().__init__()
            assert p == 0

        def forward(self, x):
            return x

    stand_in: Any = types.ModuleType("torchvision.ops")
    stand_in.StochasticDepth = NoDrop
    sys.modules |= {"torchvision.ops": stand_in, "torchvision": types.ModuleType("torchvision")}
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    sys.path.insert(0, checkout)
    from zoology.config import ModelConfig, ModuleConfig
    from zoology.model import LanguageModel

    torch.manual_seed(123)
    torch.set_num_threads(1)
    convolution = {
        "name": "zoology.mixers.base_conv.BaseConv",
        "kwargs": {"l_max": LENGTH, "kernel_size": 3, "implicit_long_conv": True},
    }
    attention = {"name": "zoology.mixers.attention.MHA", "kwargs": {"dropout": 0.1, "num_heads": 1}}
    config = ModelConfig(
        d_model=WIDTH,
        n_layers=2,
        vocab_size=vocab,
        max_position_embeddings=0,
        sequence_mixer=ModuleConfig(name="zoology.mixers.hybrid.Hybrid", kwargs={"configs": [convolution, attention]}),
        state_mixer=ModuleConfig(name="torch.nn.Identity"),
    )
    model = LanguageModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    cross_entropy = torch.nn.CrossEntropyLoss()

    def step(ids: np.ndarray, labels: np.ndarray) -> float:
        model.train()
        optimizer.zero_grad()
        logits = model(torch.from_numpy(ids))
        loss = cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten().long())
        loss.backward()
        optimizer.step()
        return loss.item()

    def answers(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            return model(torch.from_numpy(ids)).argmax(-1).numpy()

    return Trainee(step, answers)


def load(build: Callable[[int], Trainee], vocab: int, train: bool) -> Loaded:
    """A step ready to be timed, after training to the target where asked."""
    trainee, dataset = build(vocab), data(vocab).build()
    batches = [dataset.batch(0, i) for i in range(8)]
    number = 0

    def run() -> float:
        nonlocal number
        number += 1
        batch = batches[number % len(batches)]
        return trainee.step(batch.ids_BT, batch.labels_BT)

    facts = (
        trained(trainee, dataset) if train else {"first_loss": run(), "loss_after_20": [run() for _ in range(20)][-1]}
    )
    return Loaded(run, dict, facts)


def trained(trainee: Trainee, dataset: Any) -> dict[str, float]:
    """Trains until an epoch ends with the target; the CPU seconds are those of steps, compilation included."""
    seconds, accuracy, step = 0.0, 0.0, 0
    for step in range(EPOCH * MOST_EPOCHS):
        batch = dataset.batch(1, step)
        start = time.process_time()
        trainee.step(batch.ids_BT, batch.labels_BT)
        seconds += time.process_time() - start
        if (step + 1) % EPOCH == 0:
            accuracy = float(np.mean(list(_hits(trainee, dataset))))
            if accuracy >= TARGET:
                break
    return {"steps": step + 1, "cpu_s": seconds, "accuracy": accuracy}


def _hits(trainee: Trainee, dataset: Any) -> Iterator[float]:
    for batch in dataset.held_out():
        asked = batch.labels_BT >= 0
        yield float(np.mean(trainee.answers(batch.ids_BT, batch.labels_BT)[asked] == batch.labels_BT[asked]))


def _versions(*names: str) -> Callable[[], dict[str, str]]:
    from importlib.metadata import version

    return lambda: {name: version(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoology", help="a checkout of HazyResearch/zoology at dbcb60d")
    parser.add_argument("--python", help="an interpreter with torch and what Zoology needs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", action="store_true", help="also train both to 99%% at 256 words")
    parser.add_argument("--core", type=int, default=0, help="the core that both are pinned to, in turn")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--serve", choices=("ours", "zoology"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve == "ours":

        def build(everywhere: bool = False, **options: Any) -> Loaded:
            return load(lambda vocab: ours(vocab, None if everywhere else PAIRS), **options)

        serve(build, _versions("jax", "flax"))
        return
    if arguments.serve == "zoology":
        serve(lambda **options: load(lambda vocab: zoology(arguments.zoology, vocab), **options), _versions("torch"))
        return
    if not (arguments.zoology and arguments.python):
        parser.error("give --zoology CHECKOUT and --python PYTHON (how to get them: --help)")
    _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(), []
    theirs = ("--serve", "zoology", "--zoology", str(Path(arguments.zoology).resolve()))
    table = Table(title="Associative recall: CPU ms a step, median", title_justify="left")
    for name in ("words", "Zoology", "ours, every place", "ours, labelled places", "ours / Zoology", "goal"):
        table.add_column(name, justify="right")
    with (
        Contestant(MODULE, *theirs, python=arguments.python, core=arguments.core) as peer,
        Contestant(MODULE, "--serve", "ours", core=arguments.core) as mine,
    ):
        versions = peer.versions | mine.versions
        for vocab in VOCABS:
            facts = {}
            for name, contestant in (("zoology", peer), ("ours", mine)):
                facts[name] = contestant.load(str(vocab), vocab=vocab, train=False)
                if not facts[name]["loss_after_20"] < facts[name]["first_loss"]:
                    raise SystemExit(f"{name} does not learn at {vocab} words: no figures ({facts[name]})")
            mine.load(f"{vocab} everywhere", vocab=vocab, train=False, everywhere=True)
            runs = [(peer, str(vocab)), (mine, str(vocab)), (mine, f"{vocab} everywhere")]
            times = interleave(runs, arguments.rounds, seconds=1.5)
            ratio, goal = times.ratio(1), GOALS[vocab]
            colour = "green" if ratio <= goal else "red"
            table.add_row(
                f"{vocab:,}", *(f"{times.median(i):.0f}" for i in (0, 2, 1)), f"[{colour}]{ratio:.3f}[/]", f"{goal}"
            )
            rows.append({"words": vocab, "rounds": times.rounds, "ratio": ratio, "goal": goal, "facts": facts})
        console.print(table)
        if arguments.train:
            for name, contestant in (("zoology", peer), ("ours", mine)):
                facts = contestant.load("trained", vocab=VOCABS[0], train=True)
                rows.append({"words": VOCABS[0], "trained": name, **facts})
                steps, seconds, accuracy = facts["steps"], facts["cpu_s"], facts["accuracy"]
                console.print(
                    f"{name}: {accuracy:.3f} after {steps:.0f} steps, {seconds:.1f} CPU seconds, compilation included"
                )
    console.print(", ".join(f"{name} {number}" for name, number in versions.items()), highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
