"""What a training step costs as a table grows: the rows of the batch alone, or all of them.

python -m benchmarks.tables                  writes results/tables/bench.md (about a minute)
"""

import contextlib

from benchmarks.pair import Contestant, interleave
from benchmarks.report import Row, at_most, door

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


if __name__ == "__main__":
    door(__doc__, rows, "tables", "Tables on the CPU", METHOD, rounds=9)
