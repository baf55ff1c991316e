"""Associative recall by compound keys, by the law of Zoology's compositional MQAR: two tokens together are the key.

    a0 b1 v  a1 b1 v  a0 b0 v  a1 b0 v | . . . a1 b1 . . . . a0 b1 . ...      the label at b1 is the value of a1 b1

A row says side² facts: every combination of `side` first parts and `side` second parts, in random order, each with its
own value. Then every combination is asked for once. A key's parts are different draws of a third of the vocabulary
each, values of the last third, all different.

* After the context come slots of three tokens, drawn without replacement by the queries, slot g with weight
  (g+1)^(exponent-1), as in MQAR (probes/tasks/recall.py); a query is in the first two tokens of its slot.
* `filler`: "zero", token 0, or "conflict_free", any token that is no part of a key of the row (Zoology's
  default is random tokens, parts of keys too).

To answer, a model must bind a value to both parts at once: each part alone goes with `side` values.

Chance: 1 / values, a third of the vocabulary. Plateau: 1 / side², some value of the row; a model that goes by one part
only finds the right one of `side` by luck, 1 / side.
"""

import dataclasses
from typing import Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_FIRST, _SECOND, _VALUES, _ORDER, _SLOTS, _FILLER = range(6)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Compound(Task):
    """vocab, length, side, filler: the law, as above. exponent: of the slots' power law."""

    vocab: int = 256
    length: int = 96
    side: int = 3
    filler: Literal["zero", "conflict_free"] = "conflict_free"
    exponent: float = 0.01

    def __post_init__(self):
        one_of(self)
        whole(self, side=1)
        if self.length < 6 * self.side**2:
            raise DataError(
                f"Compound.length is {self.length}: {self.side**2} facts of three tokens and their queries need at "
                f"least {6 * self.side**2}"
            )
        if self.third < max(self.side + 1, self.side**2):
            least = 3 * max(self.side + 1, self.side**2)
            raise DataError(f"Compound.vocab is {self.vocab}: a third each for such keys and values needs {least}")

    @property
    def third(self) -> int:
        return self.vocab // 3

    @property
    def pairs(self) -> int:
        return self.side**2

    @property
    def asked(self) -> int:
        return self.pairs

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 2 * self.third)

    @property
    def plateau(self) -> float:
        return 1 / self.pairs

    def harder(self) -> "Compound | None":
        more = (self.side + 1) ** 2
        return dataclasses.replace(self, side=self.side + 1) if 6 * more <= self.length and more <= self.third else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, n, side, third = len(index_N), self.pairs, self.side, self.third
        first = 1 + draws.distinct(seed, _FIRST, index_N, side, third - 1)
        second = third + draws.distinct(seed, _SECOND, index_N, side, third)
        cell = draws.orders(seed, _ORDER, index_N, n)
        facts = np.empty([N, n, 3], np.int32)
        facts[:, :, 0] = np.take_along_axis(first, cell // side, 1)
        facts[:, :, 1] = np.take_along_axis(second, cell % side, 1)
        facts[:, :, 2] = 2 * third + draws.distinct(seed, _VALUES, index_N, n, self.vocab - 2 * third)
        slot = draws.slots(seed, _SLOTS, index_N, self.length // 3 - n, self.exponent, n)

        ids, labels = empty(N, self.length)
        if self.filler == "conflict_free":
            parts = np.concatenate([first, second], 1)
            ids[:] = draws.besides(seed, _FILLER, index_N, self.length, self.vocab, parts)
        ids[:, : 3 * n] = facts.reshape(N, -1)
        place = 3 * (n + slot)
        np.put_along_axis(ids, place, facts[:, :, 0], 1)
        np.put_along_axis(ids, place + 1, facts[:, :, 1], 1)
        np.put_along_axis(labels, place + 1, facts[:, :, 2], 1)
        pair = np.argsort(slot, axis=1)  # by place
        slot.sort(axis=1)
        return Rows(ids, labels, {"slot": slot, "distance": 3 * (n + slot - pair), "depth": 3 * pair})


_LAW = Compound()
_LARGE = tuple(Compound(8192, 6 * side**2, side) for side in (2, 4, 8, 12, 16))

trials = {
    "compound": Trial(
        probe(
            (_LAW,),
            (
                _LAW,
                dataclasses.replace(_LAW, side=4),
                dataclasses.replace(_LAW, length=192),
                dataclasses.replace(_LAW, length=192, side=5),
                dataclasses.replace(_LAW, length=384, side=8),
            ),
            512,
        ),
        steps=640,
        blocks=2,
    ),
    "compound@smoke": Trial(
        probe((Compound(length=32, side=2),), (Compound(length=32, side=2),), 128, B=128), steps=100
    ),
    "compound@large": Trial(probe(_LARGE[:3], _LARGE, 1_000, B=128), steps=20_000, lr=3e-3, D=128, blocks=2),
}
