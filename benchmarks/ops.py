"""Measures the operations: against peers, and over lengths."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks import cases
from benchmarks.pair import Contestant, Failed, gate, interleave
from benchmarks.peers import Peer
from benchmarks.report import Row, at_least, at_most

GATE_T = 512  # where no peer can be the judge, the definition is, at this length


class Lane(NamedTuple):
    """One core and what is common to all that is measured on it."""

    core: int | None
    folder: Path
    rounds: int
    peers: dict[str, Peer]
    options: dict[str, str | int]  # given to our operations, e.g. chunk
    versions: dict[str, str]  # of the peers that ran; filled on the way

    def ours(self) -> Contestant:
        return Contestant("benchmarks.contestants_jax", "ours", core=self.core)

    def rival(self, name: str) -> Contestant:
        peer = self.peers[name]
        contestant = Contestant(peer.module, *peer.arguments, python=peer.python, core=self.core)
        self.versions.update(contestant.versions)
        return contestant


def extra(op: str) -> dict[str, int]:
    return {"size": cases.WINDOW} if op == "window" else {}


def pairs(members: list[cases.Pair], lane: Lane) -> Iterator[Row]:
    """All rows of one operation. Our process stays the same; what it has compiled once it keeps."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(lane.ours())
        rivals: dict[str, Contestant] = {}
        known: dict[str, dict[str, float]] = {}
        for pair in members:
            missing = lane.peers[pair.peer].missing
            row = Row("Operations", pair.title, peer=pair.peer_name, note=missing)
            try:
                if not missing and pair.peer not in rivals:
                    rivals[pair.peer] = stack.enter_context(lane.rival(pair.peer))
                yield from _pair(pair, row, lane, ours, rivals.get(pair.peer), known)
            except Failed as why:
                goal = at_least(0, pair.goal) | {"result": ""}
                yield replace(row, **goal, note=str(why))


def _pair(
    pair: cases.Pair, row: Row, lane: Lane, ours: Contestant, rival: Contestant | None, known: dict[str, dict]
) -> Iterator[Row]:
    inputs = cases.write_inputs(pair.op, pair.B, pair.T, lane.folder)
    common = {"mode": pair.mode, "inputs": inputs, **extra(pair.op)}
    if pair.title not in known:
        known[pair.title] = ours.load(pair.title, op=pair.op, **common, **lane.options)
    facts = known[pair.title]
    row = replace(row, temp_mb=facts["temp_mb"], compile_s=facts["compile_s"])
    if rival is None:
        error = _gate_by_definition(pair.op, pair.mode, inputs, lane, ours)[0]
        times = interleave([(ours, pair.title)], lane.rounds)
        yield replace(row, error=error, ours_ms=times.median(0))
        return
    theirs = rival.load(pair.peer_name, op=pair.peer_op or pair.op, **common)
    error = gate(ours.outputs(pair.title, lane.folder), rival.outputs(pair.peer_name, lane.folder))
    entrants = [(ours, pair.title), (rival, pair.peer_name)]
    times = interleave(entrants, 1 if pair.slow else lane.rounds, warm=False)  # the gate was a call each
    yield replace(
        row,
        error=error,
        ours_ms=times.median(0),
        peer_ms=times.median(1),
        peer_temp_mb=theirs.get("temp_mb"),
        note="one round: the peer is slow" if pair.slow else "",
        **at_least(times.ratio(1), pair.goal),
    )
    if pair.temp_goal:
        part = facts["temp_mb"] / theirs["temp_mb"]
        yield Row(
            row.section,
            f"{pair.title}: temporary memory",
            peer=row.peer,
            temp_mb=facts["temp_mb"],
            peer_temp_mb=theirs["temp_mb"],
            **at_most(part, pair.temp_goal),
        )


def _gate_by_definition(op: str, mode: str, inputs: str, lane: Lane, ours: Contestant) -> tuple[float, dict]:
    """Loads ours under the name "MODE GATE_T"; returns the largest difference and what is known of it."""
    name, common = f"{mode} {GATE_T}", {"mode": mode, "inputs": inputs, "T": GATE_T, **extra(op)}
    facts = ours.load(name, op=op, **common, **lane.options)
    ours.load("reference", op=f"reference {op}", **common)
    return gate(ours.outputs(name, lane.folder), ours.outputs("reference", lane.folder)), facts


def lengths(op: str, lane: Lane) -> Iterator[Row]:
    """How time and temporary memory grow with the length, at B 1."""
    bounded = op != "attention"
    title = (cases.MEMORY | {"attention": "causal attention", "window": f"window attention ({cases.WINDOW})"})[op]
    inputs = cases.write_inputs(op, 1, max(cases.LENGTHS), lane.folder)
    with lane.ours() as ours:
        try:
            error, gated = _gate_by_definition(op, "fwd+bwd", inputs, lane, ours)
        except Failed as why:
            goal = cases.EXPONENT_GOAL if bounded else None
            yield Row("Length", title, note=str(why), **at_most(math.inf, goal, "") | {"result": ""})
            return
        for mode in ("fwd", "fwd+bwd"):
            # full attention is not linear in T: its longest length would take all the time there is
            lengths = cases.LENGTHS if bounded else (GATE_T, *(T // 2 for T in cases.LENGTHS[1:]))
            facts = {"fwd+bwd": {GATE_T: gated}}.get(mode, {})
            for T in lengths:
                if T not in facts:
                    options = {"op": op, "mode": mode, "inputs": inputs, "T": T, **extra(op), **lane.options}
                    facts[T] = ours.load(f"{mode} {T}", **options)
            times = interleave([(ours, f"{mode} {T}") for T in lengths], max(lane.rounds, 3), seconds=0.2)
            best = [times.best(i) for i in range(len(lengths))]
            exponent = math.log(best[-1] / best[-2]) / math.log(lengths[-1] / lengths[-2])
            yield Row(
                "Length",
                f"{title} {mode}: exponent {lengths[-2]:,} to {lengths[-1]:,}",
                ours_ms=best[-1],
                temp_mb=facts[lengths[-1]]["temp_mb"],
                compile_s=facts[lengths[-1]]["compile_s"],
                error=error,
                note=", ".join(f"T {T:,}: {ms:.1f} ms" for T, ms in zip(lengths, best, strict=True)),
                **at_most(exponent, cases.EXPONENT_GOAL if bounded else None, ""),
            )
            if mode == "fwd+bwd":
                last = facts[lengths[-1]]
                yield Row(
                    "Length",
                    f"{title} {mode}: temporary memory at {lengths[-1]:,}, times inputs, outputs and gradients",
                    temp_mb=last["temp_mb"],
                    note=f"{last['io_mb']:.0f} MB of inputs, outputs and gradients",
                    **at_most(last["temp_mb"] / last["io_mb"], cases.TEMP_GOAL if bounded else None),
                )
