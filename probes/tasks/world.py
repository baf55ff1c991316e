"""A small world, after BABILong (Kuratov et al. 2024, arXiv 2406.10149), of tokens: who is where, told between words.

    w w p AT r w w w q AT s w w p TAKES o w w w w p AT t w w WHERE o      the label: t, where p carried o

A row is a text by a chain of order 2, the same for all rows (`branches`, `chain`: as in probes/tasks/needles.py), with
`facts` facts in it, each in any gap between words, any place as likely, and a question at its end.

* `p AT r`: a person, any of all, is in another room than before, any of the others.
* `p TAKES o`: one of the persons who were said to be somewhere takes an object, any of all; whoever took it last has
  it. `takes` of the facts say so, any but the first; a fact's person is the one of an earlier AT, any of them.
* "qa1" asks `WHERE p`, p the person of any of the AT facts: the room he was last said to be in, one supporting fact.
  "qa2" asks `WHERE o`, o the object of any of the TAKES facts: the room of the person who took it last, two facts.

To answer, a model must pick facts out of words, let a person's last room overwrite the ones before, and for "qa2" go
from the object to a person and on to a room that may have been said before or after. `depth` is the start of the first
supporting fact, `distance` counts from the last to the question (of "qa2", which has two), and `pair` is the fact that
says the room.

Chance: 1 / rooms. Plateau: the last room said, whoever is there, which is right if it is the person's, or by chance.

bAbI's qa1 has one supporting fact of 2 to 10, qa2 two of 2 to 68; BABILong has 100 or 1,000 rows of each length. Of its
text, Phi-3-mini with 128k of context, instruction and examples, percent by length, counted anew from the repository's
stored answers, 999 of each:

            0k   1k   2k   4k   8k   16k   32k   64k   128k
    qa1     97   85   72   69   70    60    53    38      1
    qa2     57   39   39   38   34    23    22    15      2
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.needles import lay
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_TAKES, _PERSONS, _TAKERS, _ROOMS, _OBJECTS, _GAPS, _FILLER, _ASKED = range(8)  # streams of draws


@dataclasses.dataclass(frozen=True)
class World(Task):
    """kind, length, facts, takes, branches, chain: the law, as above. words, persons, rooms, objects: how many.

    Tokens are words, persons, rooms, objects, AT, TAKES and WHERE in this order.
    """

    kind: Literal["qa1", "qa2"] = "qa1"
    length: int = 256
    facts: int = 6
    takes: int = 0
    words: int = 256
    persons: int = 8
    rooms: int = 8
    objects: int = 4
    branches: int = 4
    chain: int = 0

    def __post_init__(self):
        one_of(self)
        whole(self, facts=1, takes=int(self.kind == "qa2"), words=1, persons=1, rooms=2, objects=1, branches=1)
        if self.takes >= self.facts:
            raise DataError(f"World.takes is {self.takes}: it must be below facts, {self.facts}")
        if self.branches > self.words:
            raise DataError(f"World.branches is {self.branches}: it must be at most words, {self.words}")
        if self.length < 3 * self.facts + 2:
            least = 3 * self.facts + 2
            raise DataError(f"World.length is {self.length}: {self.facts} facts and the question need at least {least}")

    @property
    def vocab(self) -> int:
        return self.words + self.persons + self.rooms + self.objects + 3

    @property
    def asked(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / self.rooms

    @property
    def plateau(self) -> float:
        ats, takes = self.facts - self.takes, self.takes
        last = 1 / ats  # how likely the person asked for is the one of the last AT because he was drawn by it
        if self.kind == "qa2":
            last = 0.0
            for k in range(1, takes + 1):  # the k-th TAKES says who has the object, and the last AT is before it
                holds = (1 + (k - 1) / self.objects) * (1 - 1 / self.objects) ** (takes - k) / takes
                before = math.comb(self.facts - 1 - (takes - k + 1), k - 1) / math.comb(self.facts - 1, takes)
                last += holds * before / ats
        same = last + (1 - last) / self.persons
        return same + (1 - same) / self.rooms

    def rows(self, seed: int, index_N: Ints) -> Rows:
        # At least 64 rows in a block, however long: a chain takes a step of all rows at once.
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, min(self.length, 1024))

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, F = len(index_N), self.facts
        takes, person, room, thing = self._events(seed, index_N)
        row_N = np.arange(N)
        which = draws.integers(seed, _ASKED, index_N, 1, self.takes if self.kind == "qa2" else F - self.takes)
        # The `which`-th fact of the kind that is asked about, and from it to the fact that says the room.
        of_kind = np.argsort(takes ^ (self.kind == "qa2"), axis=1, kind="stable")
        event = np.take_along_axis(of_kind, which, 1)
        asked = (thing if self.kind == "qa2" else person)[row_N, event[:, 0]]
        support = []
        if self.kind == "qa2":
            support.append(_last(takes & (thing == asked[:, None])))
            holder = person[row_N, support[0]]
        else:
            holder = asked
        support.append(_last(~takes & (person == holder[:, None])))

        first_person, first_room = self.words, self.words + self.persons
        first_thing = first_room + self.rooms
        facts = np.empty([N, F, 3], np.int64)
        facts[:, :, 0] = first_person + person
        facts[:, :, 1] = self.vocab - 3 + takes
        facts[:, :, 2] = np.where(takes, first_thing + thing, first_room + room)
        hay = self.length - 2 - 3 * F
        start = np.sort(draws.integers(seed, _GAPS, index_N, F, hay + 1), 1) + 3 * np.arange(F)
        ids, labels = empty(N, self.length)
        text = draws.markov(seed, _FILLER, index_N, hay, self.words, self.branches, self.chain)
        lay(ids[:, :-2], text, start, facts)
        ids[:, -2] = self.vocab - 1
        ids[:, -1] = asked + (first_thing if self.kind == "qa2" else first_person)
        labels[:, -1] = first_room + room[row_N, support[-1]]
        fact = np.stack(support, 1)
        about = {"pair": fact[:, -1:], "depth": np.take_along_axis(start, fact.min(1, keepdims=True), 1)}
        if self.kind == "qa2":
            about["distance"] = self.length - 2 - np.take_along_axis(start, fact.max(1, keepdims=True), 1)
        return Rows(ids, labels, about)

    def _events(self, seed: int, index_N: Ints) -> tuple[np.ndarray, Ints, Ints, Ints]:
        """Of each fact, [N, facts]: whether it is a TAKES, its person, the room that an AT says, a TAKES's object."""
        N, F = len(index_N), self.facts
        takes = np.zeros([N, F], bool)
        np.put_along_axis(takes, 1 + draws.distinct(seed, _TAKES, index_N, self.takes, F - 1), True, 1)
        person = draws.integers(seed, _PERSONS, index_N, F, self.persons)
        before = np.cumsum(~takes, axis=1)  # AT facts up to each; at a TAKES, before it
        earlier = draws.integers(seed, _TAKERS, index_N, F, before)
        at = np.argsort(takes, axis=1, kind="stable")  # AT facts in order, then the others
        person = np.where(takes, np.take_along_axis(person, np.take_along_axis(at, earlier, 1), 1), person)
        # Each move goes so many rooms on, modulo all of them, from a place before the row that is not said: any but 0.
        move = 1 + draws.integers(seed, _ROOMS, index_N, F, self.rooms - 1)
        where = draws.integers(draws.fold(seed, 0), _ROOMS, index_N, self.persons, self.rooms)
        row_N, room = np.arange(N), np.zeros([N, F], np.int64)
        for f in range(F):
            room[:, f] = (where[row_N, person[:, f]] + np.where(takes[:, f], 0, move[:, f])) % self.rooms
            where[row_N, person[:, f]] = room[:, f]
        return takes, person, room, draws.integers(seed, _OBJECTS, index_N, F, self.objects)


def _last(true_NF: np.ndarray) -> Ints:
    """The last place of each row that is true: int64 [N]."""
    return true_NF.shape[1] - 1 - np.argmax(true_NF[:, ::-1], axis=1)


def _probe(train: tuple[int, ...], tests: tuple[int, ...], rows: int, B: int = 64, **law: Any) -> Probe:
    learnt, asked = ([World(length=length, **law) for length in lengths] for lengths in (train, tests))
    return probe(learnt, asked, rows, B)


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "world": ("The room a person was last said to be in, told between words (BABILong's qa1).", {"kind": "qa1"}),
    "world_two": (
        "The room of the person who took a thing, two facts told between words (BABILong's qa2).",
        {"kind": "qa2", "facts": 8, "takes": 3},
    ),
}
trials = {}
for _name, (_about, _law) in _KINDS.items():
    trials[_name] = Trial(
        _probe((32, 64), (32, 64, 128, 256, 512, 1024), 256, 32, **_law), 2_000, 3e-3, blocks=2, mlp=True, about=_about
    )
    trials[f"{_name}@smoke"] = Trial(
        _probe((48,), (48, 96), 64, 32, words=32, **_law), 100, blocks=2, mlp=True, about=_about
    )
    trials[f"{_name}@large"] = Trial(
        _probe((1024,), (1024, 2048, 4096, 8192, 16384), 1_000, **_law),
        steps=20_000,
        lr=1e-3,
        D=128,
        blocks=2,
        mlp=True,
        about=_about,
    )
