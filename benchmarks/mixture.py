"""What a mixture of memories costs beside one layer of its base, on the CPU.

    python -m benchmarks.mixture                 writes results/mixture/bench.md (about four minutes)

A token is written to `top` of M memories and to the shared one, so that the recurrence's work is top + 1 times that of
the base, whatever M is; query, output gate and output map are there once.
"""

from dataclasses import replace

from benchmarks.pair import Contestant, interleave
from benchmarks.report import Row, at_most, door

METHOD = """\
One process, one pinned core, one thread; the clock is the CPU time of the process; rounds are interleaved. Milliseconds
are medians over rounds, ratios medians of the ratios within a round. Float32. `peer` is one layer of the base, with its
convolutions, norm, gates and maps; the mixture has top 2 and a shared memory. Temporary memory is XLA's own account."""

SHAPE = {"what": "mixture", "B": 2, "T": 2048, "D": 256, "H": 4}
MOST = 3 * 1.3  # (top + 1) · 1.3


def rows(core: int, rounds: int) -> list[Row]:
    found = []
    with Contestant("benchmarks.contestants_memories", core=core) as ours:
        for mode in ("fwd", "fwd+bwd"):
            base = ours.load("base", **SHAPE, mode=mode, M=0)
            names = {M: f"M {M}" for M in (4, 16)}
            facts = {M: ours.load(name, **SHAPE, mode=mode, M=M) for M, name in names.items()}
            times = interleave([(ours, name) for name in (*names.values(), "base")], rounds)
            for i, M in enumerate(names):
                row = Row(
                    "Mixture over Gated DeltaNet",
                    f"{mode}, M {M}",
                    peer="one GatedDeltaNet",
                    ours_ms=times.median(i),
                    peer_ms=times.median(len(names)),
                    **at_most(times.ratio(i, to=len(names)), MOST),
                )
                known = {"temp_mb": facts[M]["temp_mb"], "compile_s": facts[M]["compile_s"]}
                found.append(replace(row, peer_temp_mb=base["temp_mb"], **known))
    return found


if __name__ == "__main__":
    door(__doc__, rows, "mixture", "A mixture of memories on the CPU", METHOD, rounds=7)
