"""Rows of probes made in a CPU second, beside Zoology's and MAD-lab's generators, in one run.

    python -m benchmarks.generators                                    all tasks of this repository
    python -m benchmarks.generators --zoology CHECKOUT --mad CHECKOUT --python PYTHON

CHECKOUTs are clones of https://github.com/HazyResearch/zoology and https://github.com/athms/mad-lab; PYTHON is an
interpreter with torch, numpy and pydantic (benchmarks/recall_peers.py says how to make one). Contestants take turns,
pinned to one core; a figure is the median of the rounds. Peak memory is what a call allocates at most beyond what it
returns, as tracemalloc counts it.
"""

import argparse
import importlib
import importlib.util
import sys
import time
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pair import Contestant, Failed, Loaded, interleave, pin, serve

if __name__ == "__main__" and "--serve" in sys.argv:
    pin()

import numpy as np

MODULE = "benchmarks.generators"
GOAL, MQAR_GOAL = 5_000, 100_000  # rows a CPU second
# Ours, Zoology's or MAD's generator, and what it is given.
PAIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "MQAR, 8,192 words, 64 tokens, 4 pairs": ("zoology", {"vocab_size": 8192, "input_seq_len": 64, "num_kv_pairs": 4}),
    "MQAR, 256 words, 64 tokens, 4 pairs": ("zoology", {"vocab_size": 256, "input_seq_len": 64, "num_kv_pairs": 4}),
    "MQAR, 8,192 words, 256 tokens, 64 pairs": (
        "zoology",
        {"vocab_size": 8192, "input_seq_len": 256, "num_kv_pairs": 64},
    ),
    "mad_recall@paper": (
        "generate_in_context_recall_instance",
        {"vocab_size": 16, "seq_len": 128, "noise_vocab_size": 0},
    ),
    "mad_noisy@paper": (
        "generate_noisy_in_context_recall_instance",
        {"vocab_size": 32, "seq_len": 128, "noise_vocab_size": 16, "frac_noise": 0.2},
    ),
    "mad_fuzzy@paper": ("generate_fuzzy_in_context_recall_instance", {"vocab_size": 16, "seq_len": 128}),
    "mad_copy@paper": (
        "generate_selective_copying_instance",
        {"vocab_size": 16, "seq_len": 256, "num_tokens_to_copy": 16},
    ),
    "mad_compress@paper": ("generate_compression_instance", {"vocab_size": 16, "seq_len": 32}),
    "mad_memorize@paper": ("generate_memorization_instance", {"vocab_size": 256, "seq_len": 32}),
}
BATCH = {"zoology": 2_000}


def mine(name: str, rows: int) -> Callable[[], Any]:
    from probes.tasks.recall import MQAR
    from probes.tasks.task import discover

    trials = discover()
    if name in trials:
        law: Any = trials[name].data.train[0].task
    else:
        given = PAIRED[name][1]
        law = MQAR(given["vocab_size"], given["input_seq_len"], given["num_kv_pairs"])
    return lambda: law.rows(0, np.arange(rows))


def theirs(name: str, rows: int, checkouts: dict[str, str]) -> Callable[[], Any]:
    which, given = PAIRED[name]
    if which == "zoology":
        sys.path.insert(0, checkouts["zoology"])
        sys.modules.setdefault("wandb", types.ModuleType("wandb"))
        make = importlib.import_module("zoology.data.multiquery_ar").multiquery_ar
        return lambda: make(num_examples=rows, seed=0, **given)
    spec = importlib.util.spec_from_file_location("instances", Path(checkouts["mad"]) / "mad/data/instances.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draw = np.random.default_rng(0)
    return lambda: [getattr(module, which)(rng=draw, multi_query=True, **given) for _ in range(rows)]


def load(make: Callable[[str, int], Callable[[], Any]], task: str, rows: int) -> Loaded:
    run = make(task, rows)
    run()  # what is drawn once for all rows is not a row's cost
    tracemalloc.start()
    kept = run()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return Loaded(run, dict, {"extra_bytes_a_row": (peak - held) / rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoology", help="a checkout of HazyResearch/zoology")
    parser.add_argument("--mad", help="a checkout of athms/mad-lab")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with what the peers need")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the core that all are pinned to, in turn")
    parser.add_argument("--write", type=Path, help="also write the table, as Markdown")
    parser.add_argument("--serve", choices=("ours", "peers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkouts = {"zoology": options.zoology, "mad": options.mad}
    if options.serve == "ours":
        serve(lambda **asked: load(mine, **asked), lambda: {"numpy": np.__version__})
    elif options.serve == "peers":
        serve(lambda **asked: load(lambda n, r: theirs(n, r, checkouts), **asked), lambda: {"numpy": np.__version__})
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from probes.tasks.task import discover

    console, lines = Console(), []
    asked = ["--serve", "peers"]
    for name in ("zoology", "mad"):
        if getattr(options, name):
            asked += [f"--{name}", str(Path(getattr(options, name)).resolve())]
    trials = [name for name in discover() if "@" not in name and name != "mqar"]
    names = [*PAIRED, *(name for name in trials if f"{name}@paper" not in PAIRED)]
    known = {*discover(), *(name for name in PAIRED if name.startswith("MQAR"))}
    head = (
        "| task | rows a CPU second | goal | extra bytes a row | peer's rows a CPU second | its bytes a row | times |"
    )
    lines = [head, "|---|" + "---:|" * 6]
    console.print(head, soft_wrap=True)
    with (
        Contestant(MODULE, "--serve", "ours", core=options.core) as ours,
        Contestant(MODULE, *asked, python=options.python, core=options.core) as peer,
    ):
        for name in (name for name in names if name in known):
            facts = ours.load(name, task=name, rows=10_000)
            runs, other = [(ours, name)], None
            which = "" if name not in PAIRED else "zoology" if PAIRED[name][0] == "zoology" else "mad"
            if which and getattr(options, which):
                rows = BATCH.get(PAIRED[name][0], 50)
                try:
                    other = peer.load(name, task=name, rows=rows)
                    runs.append((peer, name))
                except Failed as failed:
                    console.print(f"{name}: no figure of the peer: {failed}")
            times = interleave(runs, options.rounds, seconds=0.5)
            speed = 10_000 / times.median(0) * 1e3
            goal = MQAR_GOAL if name.startswith("MQAR, 8,192 words, 64") else GOAL
            row = [name, f"{speed:,.0f}", f"{goal:,}{'' if speed >= goal else ' missed'}"]
            row.append(f"{facts['extra_bytes_a_row']:,.0f}")
            if other is not None:
                peers = rows / times.median(1) * 1e3
                row += [f"{peers:,.0f}", f"{other['extra_bytes_a_row']:,.0f}", f"{speed / peers:,.0f}"]
            else:
                row += ["", "", ""]
            lines.append(f"| {' | '.join(row)} |")
            console.print(lines[-1], soft_wrap=True)
    if options.write:
        said = time.strftime("%Y-%m-%d")
        given = "".join(f" --{name} CHECKOUT" for name in ("zoology", "mad") if getattr(options, name))
        command = f"python -m benchmarks.generators{given}{' --python PYTHON' * bool(given)} --rounds {options.rounds}"
        lines = ["# Generators", "", *lines, "", f"`{command}`, {said}, numpy {np.__version__}, one core."]
        options.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
