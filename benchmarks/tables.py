"""What a training step costs as a table grows: the rows of the batch alone, or all of them.

    python -m benchmarks.tables                  writes results/tables/bench.md (about two minutes)
"""

import argparse
import contextlib
import os
import time
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.pair import ROOT, Contestant, interleave
from benchmarks.report import Row, at_most

METHOD = """\
A whole training step (forward, backward, clipping, AdamW) of a small model around one Engram: B 8, T 256, D 64, an MLP,
rows of width 16, of which a step looks up 4,096 (2-grams and 3-grams of random bytes). `ours` is lazy
(`optimizer.lazy_tables`), `peer` the usual AdamW over the whole table. A process for each size, one pinned core, one
thread; the clock is the CPU time of the process. Rounds are interleaved over all sizes, first of lazy steps and then of
dense ones, which would otherwise leave the caches cold for their neighbours. Milliseconds are medians over rounds and
`result` is their ratio; what more rows cost is the median of the ratios within a round: rows of a larger table are
further from the processor. Float32, donated buffers. Temporary memory is XLA's own account, without the table and its
moments."""

SIZES = (16, 20, 22)  # log2 of the rows
SHAPE = {"B": 8, "T": 256, "D": 64, "K": 16}
MOST = 1.2  # of lazy steps: the largest table's over the smallest's


def rows(core: int, rounds: int) -> list[Row]:
    found = []
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Contestant("benchmarks.contestants_tables", core=core)) for _ in SIZES]
        facts, times = {}, {}
        for name in ("lazy", "dense"):
            for contestant, size in zip(made, SIZES, strict=True):
                facts[name, size] = contestant.load(name, lazy=name == "lazy", rows=1 << size, **SHAPE)
            times[name] = interleave([(contestant, name) for contestant in made], rounds)
        for i, size in enumerate(SIZES):
            ours, peer = times["lazy"].median(i), times["dense"].median(i)
            found.append(
                Row(
                    "A step, lazy beside dense",
                    f"{1 << size:,} rows",
                    peer="dense",
                    ours_ms=ours,
                    peer_ms=peer,
                    result=f"{peer / ours:.2f}x",
                    temp_mb=facts["lazy", size]["temp_mb"],
                    peer_temp_mb=facts["dense", size]["temp_mb"],
                    compile_s=facts["lazy", size]["compile_s"],
                )
            )
        last = len(SIZES) - 1
        grown = f"{1 << SIZES[last]:,} rows over {1 << SIZES[0]:,}"
        more = times["lazy"].ratio(last), times["dense"].ratio(last)
        found.append(Row("What more rows cost", f"lazy, {grown}", **at_most(more[0], MOST)))
        found.append(Row("What more rows cost", f"dense, {grown}", result=f"{more[1]:.2f}x"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
    parser.add_argument("--core", type=int, default=0, help="the core that everything is pinned to (default 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "tables" / "bench.md")
    options = parser.parse_args()
    start, load = time.time(), f"{os.getloadavg()[0]:.1f}"
    found, console = rows(options.core, options.rounds), Console()
    report.show(found, console)
    command = f"python -m benchmarks.tables --rounds {options.rounds}"
    facts = report.facts(command, {}, options.rounds, load, time.time() - start)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report.markdown(found, facts, "Tables on the CPU", METHOD))
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
