"""What the devices of a compiled program tell each other, read from its HLO text.

A computation that is called counts as often as it is called: the body of a loop as often as it turns, by what the
compiler says or the loop compares its counter with, and once where neither is known. Of a conditional, the branch that
moves most counts. The TPU's compiler spreads a collective over several fusions, to hide it behind arithmetic; all of
them name one channel and chain, and count once.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One instruction.

    array: bytes of the array that is put together or summed, as a device holds it whole. sent: bytes that a device has
    to send at least. across: whether it goes from one slice to another. times: how often a step runs it. chain: what
    pieces of one collective have in common; "" for one that is whole.
    """

    kind: str
    array: int
    sent: float
    across: bool = False
    times: int = 1
    chain: str = ""


class Account(NamedTuple):
    """uncounted: loops with collectives in them of which the compiler does not say how often they turn."""

    collectives: list[Collective]
    uncounted: int

    def by_kind(self) -> dict[str, dict[str, int]]:
        """instructions, how often a step runs them, and bytes a step: of the arrays, and sent by a device."""
        said = {}
        for kind in KINDS:
            some = [c for c in self.collectives if c.kind == kind]
            said[kind] = {
                "instructions": len(some),
                "runs": sum(c.times for c in some),
                "bytes": sum(c.times * c.array for c in some),
                "sent": round(sum(c.times * c.sent for c in some)),
                "across_slices": sum(c.times * c.array for c in some if c.across),
            }
        return said

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, at least."""
        return sum(c.times * c.sent for c in self.collectives)


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes
    fusion: bool  # whether it stands in a computation that scatters what it reduces


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}")
_PART = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\]")


def read(text: str, slices: Sequence[int]) -> Account:
    """slices: which slice each device of the mesh is in, in the mesh's order."""
    entry, bodies = _computations(text)
    known: dict[str, Account] = {}

    def account(name: str) -> Account:
        if name not in known:
            known[name] = Account([], 0)  # HLO has no recursion
            known[name] = _account(bodies.get(name, []), slices, account, turns)
        return known[name]

    def turns(attributes: str) -> int | None:
        named = re.search(r"condition=%?([\w.\-]+)", attributes)
        return _turns(bodies.get(named[1], [])) if named else None

    return account(entry)


def _account(
    body: list["_Instruction"],
    slices: Sequence[int],
    account: Callable[[str], Account],
    turns: Callable[[str], int | None],
) -> Account:
    found: list[Collective] = []
    uncounted = 0
    for line in body:
        kind = line.operation.removesuffix("-start")
        if kind in KINDS:
            found.append(_collective(kind, line, slices))
            continue
        if line.operation.endswith(("-done", "-update")):
            continue
        called = [account(name) for name in _CALLED.findall(line.rest)]
        if branches := _BRANCHES.search(line.rest):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            called.append(max(map(account, names), key=lambda branch: branch.sent))
        elif "true_computation=" in line.rest:
            called = [max(called, key=lambda branch: branch.sent)]
        trips = 1
        if line.operation == "while" and any(inner.collectives for inner in called):
            said = _TRIPS.search(line.rest)
            known = int(said[1]) if said else turns(line.rest)
            uncounted += known is None
            trips = known or 1
        for inner in called:
            found += [c._replace(times=c.times * trips) for c in inner.collectives]
            uncounted += inner.uncounted
    whole = {c.chain or index: c for index, c in enumerate(found)}
    return Account(list(whole.values()), uncounted)


def _turns(condition: Sequence["_Instruction"]) -> int | None:
    """How often a loop turns that counts from 0 up to a constant, as those of jax.lax.scan do."""
    numbers = {line.name: int(line.rest.split(")")[0]) for line in condition if _is_number(line)}
    for line in condition:
        if line.operation == "compare" and "direction=LT" in line.rest:
            return numbers.get(line.rest.split(")")[0].split(",")[-1].split()[-1].lstrip("%"))
    return None


def _is_number(line: "_Instruction") -> bool:
    return line.operation == "constant" and line.rest.split(")")[0].isdigit()


def _computations(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    entry, name = "", ""
    bodies: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and (found := _LINE.match(line)):
            bodies[name].append(
                _Instruction(found[1], found[2], found[3], found[4], name.startswith("all-reduce-scatter"))
            )
    return entry, bodies


def _collective(kind: str, line: _Instruction, slices: Sequence[int]) -> Collective:
    groups = groups_of(line.rest, len(slices))
    n = len(groups[0])
    parts = [_bytes(*part) for part in _PART.findall(line.shape)]
    if line.operation.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operands, results, ...): what is whole is the larger half of it
        parts = [max(parts)] if len(parts) < 4 or kind == "collective-permute" else parts[len(parts) // 2 :]
    array = sum(parts)
    if kind == "all-reduce" and line.fusion:  # the TPU compiler's reduce-scatter: a sum of which a piece is kept
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        array *= n
    sent = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n) * array
    across = any(len({slices[i] for i in group if i < len(slices)}) > 1 for group in groups)
    chain = re.search(r'chain_id="(\d+)"', line.rest)
    channel = re.search(r"channel_id=(\d+)", line.rest)
    return Collective(kind, array, sent, across, chain=f"{channel and channel[1]} {chain[1]}" if chain else "")


def _bytes(kind: str, shape: str) -> int:
    if kind == "token" or kind == "opaque":
        return 0
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    sizes = [int(size.removeprefix("<=")) for size in shape.split(",") if size]
    return math.ceil(math.prod(sizes) * bits / 8)


def groups_of(rest: str, devices: int) -> list[list[int]]:
    """Who tells whom: lists of devices, by their place in the mesh."""
    if found := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
        return _lists(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, sizes, order = ([int(i) for i in part.split(",")] if part else None for part in found.groups())
        ids = np.arange(devices if sizes is None else math.prod(sizes)).reshape(sizes or (devices,))
        return ids.transpose(order).reshape(shape).tolist()
    if found := _MESH.search(rest):
        return _of_mesh(*found.groups())
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _lists(found[1])
    return [list(range(devices))]


def _of_mesh(axes: str, dimensions: str | None, order: str | None, over: str) -> list[list[int]]:
    """Groups over axes of a mesh, or over parts of them: 'axis_0':(2)4 is 4 of axis_0, after its first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if dimensions is not None:
        ids = ids.reshape(_numbers(dimensions))
        ids = ids.transpose(_numbers(order)) if order else ids
    asked = []  # (axis, from which product of its parts on, to which)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", over):
        first = int(before or 1)
        asked.append((name, first, first * int(size or sizes[name])))
    shape: list[int] = []
    within: list[int] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(cut for axis, *ends in asked if axis == name for cut in ends)})
        for low, high in itertools.pairwise(cuts):
            if any(axis == name and first <= low and high <= last for axis, first, last in asked):
                within.append(len(shape))
            shape.append(high // low)
    size = math.prod(shape[i] for i in within)
    return np.moveaxis(ids.reshape(shape), within, range(-len(within), 0)).reshape(-1, size).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _lists(text: str) -> list[list[int]]:
    return [[int(i) for i in group.split(",") if i.strip()] for group in re.findall(r"\{([\d, ]*)\}", text)]
