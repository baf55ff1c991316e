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

    def ours(self, who: str = "ours") -> Contestant:
        return Contestant("benchmarks.contestants_jax", who, core=self.core)

    def rival(self, name: str) -> Contestant:
        peer = self.peers[name]
        contestant = Contestant(peer.module, *peer.arguments, python=peer.python, core=self.core)
        if name != "maxtext":
            self.versions.update(contestant.versions)
        else:
            self.versions["MaxText"] = "the checkout given"
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
            judge = "reference" if missing else pair.peer
            try:
                if judge not in rivals:
                    rivals[judge] = stack.enter_context(lane.ours(judge) if missing else lane.rival(judge))
                yield from _pair(pair, row, lane, ours, rivals[judge], known)
            except Failed as why:
                goal = at_least(0, pair.goal) | {"result": ""}
                yield replace(row, **goal, note=str(why))


def _pair(
    pair: cases.Pair, row: Row, lane: Lane, ours: Contestant, rival: Contestant, known: dict[str, dict[str, float]]
) -> Iterator[Row]:
    inputs = cases.write_inputs(pair.op, pair.B, pair.T, lane.folder)
    common = {"mode": pair.mode, "inputs": inputs, **extra(pair.op)}
    if pair.title not in known:
        known[pair.title] = ours.load(pair.title, op=pair.op, **common, **lane.options)
    facts = known[pair.title]
    row = replace(row, temp_mb=facts["temp_mb"], compile_s=facts["compile_s"])
    if lane.peers[pair.peer].missing:
        error = _gate_by_definition(pair.op, pair.mode, inputs, lane, ours, rival)
        times = interleave([(ours, pair.title)], lane.rounds)
        yield replace(row, error=error, ours_ms=times.median(0))
        return
    theirs = rival.load(pair.peer_name, op=pair.peer_op or pair.op, **common)
    error = gate(ours.outputs(pair.title, lane.folder), rival.outputs(pair.peer_name, lane.folder))
    entrants = [(ours, pair.title), (rival, pair.peer_name)]
    times = interleave(entrants, 1 if pair.slow else lane.rounds, warm=not pair.slow)
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


def _gate_by_definition(op: str, mode: str, inputs: str, lane: Lane, ours: Contestant, reference: Contestant) -> float:
    common = {"op": op, "mode": mode, "inputs": inputs, "T": GATE_T, **extra(op)}
    ours.load("gate", **common, **lane.options)
    reference.load("gate", **common)
    return gate(ours.outputs("gate", lane.folder), reference.outputs("gate", lane.folder))


def lengths(op: str, lane: Lane) -> Iterator[Row]:
    """How time and temporary memory grow with the length, at B 1."""
    bounded = op != "attention"
    title = (cases.MEMORY | {"attention": "causal attention", "window": f"window attention ({cases.WINDOW})"})[op]
    inputs = cases.write_inputs(op, 1, max(cases.LENGTHS), lane.folder)
    with lane.ours() as ours:
        try:
            with lane.ours("reference") as reference:
                error = _gate_by_definition(op, "fwd+bwd", inputs, lane, ours, reference)
        except Failed as why:
            goal = cases.EXPONENT_GOAL if bounded else None
            yield Row("Length", title, note=str(why), **at_most(math.inf, goal, "") | {"result": ""})
            return
        for mode in ("fwd", "fwd+bwd"):
            # attention is not linear in T: its longest length would take all the time there is
            lengths = cases.LENGTHS if bounded else tuple(T // 2 for T in cases.LENGTHS)
            facts = {
                T: ours.load(f"{mode} {T}", op=op, mode=mode, inputs=inputs, T=T, **extra(op), **lane.options)
                for T in lengths
            }
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
