"""Test-time memory on the CPU: our forms against each other, and the Titans layer beside titans-pytorch.

    python -m benchmarks.memories                writes results/test_time/bench.md (about five minutes)
    python -m benchmarks.memories --rounds 3 --only forms

titans-pytorch comes with `make bench-peers`. Its default takes all gradients of a sequence at the initial weights, and
momentum and decay once for a chunk; ours takes them where each chunk began, and gates for each token: the sizes and the
cost of the two are compared, not what they compute.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks import peers, report
from benchmarks.pair import ROOT, Contestant, Failed, gate, interleave
from benchmarks.report import Row, at_least, at_most

METHOD = """\
One process, one pinned core and one thread a contestant; the clock is the CPU time of the process; rounds are
interleaved. Milliseconds are medians over rounds, ratios medians of the ratios within a round. Float32. The forms'
outputs and gradients are compared (`error`, relative); titans-pytorch computes another function, at the same sizes.
Temporary memory is XLA's own account."""


REMAT = {True: "chunks recomputed", False: "all kept"}


def forms(core: int, rounds: int, folder: Path, versions: dict[str, str]) -> Iterator[Row]:
    """What a token's weights cost that are never needed: B 1, H 2, K 64, hidden 256, T 1,024, C 16."""
    shape = {"what": "engine", "mode": "fwd+bwd", "B": 1, "T": 1024, "H": 2, "K": 64, "C": 16}
    names = [("dual", True), ("materialised", True), ("materialised", False), ("dual", False)]
    with Contestant("benchmarks.contestants_memories", core=core) as ours:
        facts = {name: ours.load(str(name), **shape, form=name[0], remat=name[1]) for name in names}
        errors = {n: gate(ours.outputs(str(names[0]), folder), ours.outputs(str(n), folder), 1e-3) for n in names}
        times = interleave([(ours, str(name)) for name in names], rounds)
        for i, (form, remat) in enumerate(names):
            name = (form, remat)
            row = Row("Forms, forward and backward", f"{form}, {REMAT[remat]}", ours_ms=times.median(i))
            yield _known(row, facts[name], errors[name])
        # The goals are set against that form as it comes, all kept; recomputing, it is smaller and slower still.
        for i, name in ((2, names[2]), (1, names[1])):
            ratio, judged = facts[names[0]]["temp_mb"] / facts[name]["temp_mb"], i == 2
            title = f"default against materialised, {REMAT[name[1]]}"
            speed, memory = (5.0, 0.25) if judged else (None, None)
            yield Row("Forms, forward and backward", f"{title}: speed", **at_least(times.ratio(i), speed))
            yield Row("Forms, forward and backward", f"{title}: memory", **at_most(ratio, memory))


def _known(row: Row, facts: dict[str, float], error: float | None = None) -> Row:
    return replace(row, temp_mb=facts["temp_mb"], compile_s=facts["compile_s"], error=error)


def beside_titans(core: int, rounds: int, folder: Path, versions: dict[str, str]) -> Iterator[Row]:
    """The layer, D 256, 4 heads of 64, two matrices of expansion 4."""
    peer = peers.find("torch")
    if peer.missing:
        yield Row("Beside titans-pytorch", "all", note=peer.missing)
        return
    with (
        Contestant("benchmarks.contestants_memories", core=core) as ours,
        Contestant("benchmarks.contestants_titans", core=core, python=peer.python) as theirs,
    ):
        versions.update(theirs.versions)
        for T, C in ((2048, 64), (8192, 64), (2048, 16)):
            for mode, goal in (("fwd", 3.5), ("fwd+bwd", 2.0)):
                B = 2 if T == 2048 else 1
                shape = {"mode": mode, "B": B, "T": T, "D": 256, "H": 4, "C": C}
                facts = ours.load("ours", what="layer", remat=True, **shape)
                theirs.load("theirs", **shape)
                times = interleave([(ours, "ours"), (theirs, "theirs")], rounds)
                row = Row(
                    "Beside titans-pytorch",
                    f"{mode}, B {B}, T {T}, C {C}",
                    peer="titans-pytorch",
                    ours_ms=times.median(0),
                    peer_ms=times.median(1),
                    **at_least(times.ratio(1), goal if C == 64 else None),
                )
                yield _known(row, facts)
                if mode == "fwd+bwd":
                    whole = ours.load("whole", what="layer", remat=False, **shape)["temp_mb"]
                    yield Row(
                        "Beside titans-pytorch",
                        f"T {T}, C {C}: memory, {REMAT[True]} against {REMAT[False]}",
                        temp_mb=facts["temp_mb"],
                        peer_temp_mb=whole,
                        **at_most(facts["temp_mb"] / whole, 0.2),
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("forms", "titans"), help="one of the two sections")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--core", type=int, default=0, help="the core that contestants are pinned to (default 0)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "test_time" / "bench.md")
    options = parser.parse_args()
    console, rows, start, load = Console(), [], time.time(), f"{os.getloadavg()[0]:.1f}"
    versions: dict[str, str] = {}
    folder = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name, section in (("forms", forms), ("titans", beside_titans)):
        if options.only in (None, name):
            try:
                for row in section(options.core, options.rounds, folder, versions):
                    rows.append(row)
                    console.print(row.section, row.item, row.ours_ms, row.peer_ms, row.result, row.temp_mb)
            except Failed as why:
                rows.append(Row(name, "all", note=str(why)))
    report.show(rows, console)
    if options.only is None:
        command = f"python -m benchmarks.memories --rounds {options.rounds}"
        facts = report.facts(command, versions, options.rounds, load, time.time() - start)
        options.output.write_text(report.markdown(rows, facts, "Test-time memory on the CPU", METHOD))
        console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
