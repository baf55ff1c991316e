"""Speed and memory on the CPU, beside peers measured in the same run.

    python -m benchmarks.cpu                            all rows, the table, results/bench_cpu.md
    python -m benchmarks.cpu --only gdn,gla             some; also pairs, lengths, decode, train, host, pairs.gdn ...
    python -m benchmarks.cpu --only pairs.gdn --ours chunk=32
    python -m benchmarks.cpu --install-peers            the peers' own environments (see benchmarks/peers.py)

A partial run prints its table and writes no file unless --output names one.
"""

import argparse
import os
import queue
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import cases, models, ops, peers, report
from benchmarks.pair import ROOT, Failed
from benchmarks.report import Row


class Task(NamedTuple):
    name: str  # dotted: each part can be asked for by --only
    cost: float  # roughly its seconds: long ones start first
    measure: Callable[[ops.Lane], Iterator[Row]]


def tasks() -> list[Task]:
    """All there is, in the order of the report."""
    result = []
    groups: dict[str, list[cases.Pair]] = {}
    for pair in cases.PAIRS:
        groups.setdefault(pair.tag, []).append(pair)
    for tag, members in groups.items():
        cost = sum(8 if pair.slow or pair.T > 2048 else 4 for pair in members)
        result.append(Task(f"pairs.{tag}", cost, partial(ops.pairs, members)))
    for op in (*cases.MEMORY, "window", "attention"):
        result.append(Task(f"lengths.{cases.TAGS.get(op, op)}", 20, partial(ops.lengths, op)))
    return result + [Task(*task) for task in models.TASKS]


def chosen(only: str | None) -> list[Task]:
    """Tasks of which a part, or the dotted name up to a part, was asked for. Raises SystemExit for an unknown word."""
    if not only:
        return tasks()
    words = only.split(",")
    names = {task.name: task.name.split(".") for task in tasks()}

    def answers(word: str, parts: list[str]) -> bool:
        wanted = word.split(".")
        return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))

    for word in words:
        if not any(answers(word, parts) for parts in names.values()):
            raise SystemExit(f"--only {word}: choose among {', '.join(sorted({p for n in names.values() for p in n}))}")
    return [task for task in tasks() if any(answers(word, names[task.name]) for word in words)]


def run(selected: list[Task], lanes: list[ops.Lane], console: Console) -> list[Row]:
    """Tasks shared out to the lanes, one thread a lane, longest first; rows in the order of `selected`."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in sorted(range(len(selected)), key=lambda i: -selected[i].cost):
        waiting.put(i)
    rows: dict[int, list[Row]] = {i: [] for i in range(len(selected))}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(selected))

        def work(lane: ops.Lane) -> None:
            while True:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    for row in selected[i].measure(lane):
                        rows[i].append(row)
                        against = f" vs {row.peer}" if row.peer else ""
                        console.print(f"[dim]{row.item}{against}: {row.result} {row.note}")
                except Failed as why:
                    rows[i].append(Row("Failed", selected[i].name, met=False, note=str(why)))
                progress.advance(bar)

        threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [row for i in range(len(selected)) for row in rows[i]]


def option(text: str) -> tuple[str, str | int]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, int(value) if value.isdigit() else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory on the CPU, beside peers.", prog="benchmarks.cpu")
    parser.add_argument("--only", help="comma-separated parts, e.g. gdn,gla or pairs.gdn or decode")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds a row (default 3)")
    parser.add_argument("--ours", type=option, nargs="*", default=[], help="options of our operations, e.g. chunk=32")
    parser.add_argument("--lanes", type=int, default=2, help="cores used at once (default 2; 1 is quieter)")
    parser.add_argument("--maxtext", help="a checkout of MaxText, for its gated delta rule")
    parser.add_argument("--torch-python", help="an interpreter with torch and fla-core")
    parser.add_argument("--tokamax-python", help="an interpreter with tokamax")
    parser.add_argument("--install-peers", action="store_true", help="create the peers' environments and stop")
    parser.add_argument("--output", type=Path, help="the Markdown file (default, for a full run: results/bench_cpu.md)")
    arguments = parser.parse_args()
    if arguments.install_peers:
        peers.install()
        return
    selected = chosen(arguments.only)
    output = arguments.output or (None if arguments.only else ROOT / "results" / "bench_cpu.md")
    console = Console(width=None if sys.stdout.isatty() else 200)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    found = {
        "torch": peers.find("torch", arguments.torch_python),
        "tokamax": peers.find("tokamax", arguments.tokamax_python),
        "maxtext": peers.find("maxtext", checkout=arguments.maxtext),
    }
    versions: dict[str, str] = {}
    start, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        lanes = [
            ops.Lane(core, Path(folder) / str(i), arguments.rounds, found, dict(arguments.ours), versions)
            for i, core in enumerate(cores[-arguments.lanes :])
        ]
        for lane in lanes:
            lane.folder.mkdir()
        rows = run(selected, lanes, console)
    report.show(rows, console)
    command = shlex.join(["python", "-m", "benchmarks.cpu", *public(sys.argv[1:])])
    loads = f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"
    facts = report.facts(command, versions, arguments.rounds, loads, time.time() - start)
    console.print(f"{facts['took']}, load average {loads}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(report.markdown(rows, facts))
        console.print(f"written: {output}")


def public(arguments: list[str]) -> list[str]:
    """The command as another machine would give it: a path is named by what it is."""
    names = {"--maxtext": "CHECKOUT", "--torch-python": "PYTHON", "--tokamax-python": "PYTHON", "--output": "FILE"}
    result = list(arguments)
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in names and value:
            result[i] = f"{flag}={names[flag]}"
        elif flag in names and i + 1 < len(arguments):
            result[i + 1] = names[flag]
    return result


if __name__ == "__main__":
    main()
