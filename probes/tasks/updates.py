"""Associative recall with updates, by the law of Zoology's forgetting MQAR: of a key's values, the last one counts.

    k0 v0 k1 v1 k2 v2 | k1 w | . . k1 . . k2 . k0 ...      the labels: w at k1, v2 at k2, v0 at k0

A row says `pairs` key-value pairs, then `updates` of its keys, chosen at random, again with new values, then asks for
each key once. Keys, slots and filler are as in MQAR (probes/tasks/recall.py), queries in the order in which they were
drawn; "zero" and "conflict_free" are the fillers that bind no key again (Zoology's default, random tokens, may).

All values of a row are different, so a key's new value is never its old one nor that of any other. (Zoology only sees
to it that the new value of the j-th update is not the old one of the j-th key, which is not the key that is updated: it
may be said twice.)

To answer, a model must overwrite: an additive memory that keeps both values of a key has no way to tell which came
last. `older` of a question are the values that its key had before, 0 or 1.

Chance: 1 / (vocab - vocab/2), any value. Plateau: 1 / (pairs + updates), some value of the row; a model that overwrites
nothing says the old value at each key that has a new one, and is right in 1 - updates/pairs of the questions.
"""

import dataclasses
from typing import Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_KEYS, _VALUES, _SLOTS, _FILLER, _UPDATED = range(5)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Updates(Task):
    """vocab, length, pairs, updates, filler: the law, as above. exponent: of the slots' power law."""

    vocab: int = 256
    length: int = 64
    pairs: int = 8
    updates: int = 4
    filler: Literal["zero", "conflict_free"] = "conflict_free"
    exponent: float = 0.01

    def __post_init__(self):
        one_of(self)
        whole(self, pairs=1, updates=0)
        if self.updates > self.pairs:
            raise DataError(f"Updates.updates is {self.updates}: a key is updated once, so at most pairs, {self.pairs}")
        if self.length % 2:
            raise DataError(f"Updates.length is {self.length}: it must be even, a query's slot is two tokens wide")
        least = self.context + 2 * self.pairs
        if self.length < least:
            raise DataError(
                f"Updates.length is {self.length}: {self.pairs} pairs, {self.updates} updates and the queries need at "
                f"least {least}"
            )
        if self.vocab < 2 * (self.pairs + self.updates) + 2:
            least = 2 * (self.pairs + self.updates) + 2
            raise DataError(f"Updates.vocab is {self.vocab}: so many keys and values need at least {least}")

    @property
    def context(self) -> int:
        return 2 * (self.pairs + self.updates)

    @property
    def asked(self) -> int:
        return self.pairs

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.vocab // 2)

    @property
    def plateau(self) -> float:
        return 1 / (self.pairs + self.updates)

    def harder(self) -> "Updates | None":
        fits = 2 * (self.context + 2 * self.pairs) <= self.length and 2 * self.context + 2 <= self.vocab
        return dataclasses.replace(self, pairs=2 * self.pairs, updates=2 * self.updates) if fits else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        pairs, said, vocab = self.pairs, self.pairs + self.updates, self.vocab
        keys = 1 + draws.distinct(seed, _KEYS, index_N, pairs, vocab // 2 - 1)
        values = vocab // 2 + draws.distinct(seed, _VALUES, index_N, said, vocab - vocab // 2)
        updated = draws.distinct(seed, _UPDATED, index_N, self.updates, pairs)
        space = (self.length - self.context) // 2
        place = self.context + 2 * draws.slots(seed, _SLOTS, index_N, space, self.exponent, pairs)

        ids, labels = empty(len(index_N), self.length)
        if self.filler == "conflict_free":
            ids[:] = draws.besides(seed, _FILLER, index_N, self.length, vocab, keys)
        ids[:, 0 : 2 * said : 2] = np.concatenate([keys, np.take_along_axis(keys, updated, 1)], 1)
        ids[:, 1 : 2 * said : 2] = values
        last = np.broadcast_to(np.arange(pairs), keys.shape).copy()  # where a key was said last, in pairs
        np.put_along_axis(last, updated, np.broadcast_to(np.arange(pairs, said), updated.shape), 1)
        np.put_along_axis(ids, place, keys.astype(np.int32), 1)
        np.put_along_axis(labels, place, np.take_along_axis(values, last, 1).astype(np.int32), 1)
        pair = np.argsort(place, axis=1)  # by place
        place, last = np.take_along_axis(place, pair, 1), np.take_along_axis(last, pair, 1)
        about = {"slot": (place - self.context) // 2, "distance": place - 2 * last, "depth": 2 * last}
        if self.updates:
            about["pair"] = pair
        if 0 < self.updates < pairs:
            about["older"] = (last >= pairs).astype(np.int64)
        return Rows(ids, labels, about)


_LAW = Updates()
_SMOKE = Updates(length=32, pairs=4, updates=2)
_LARGE = tuple(
    Updates(8192, length, pairs, pairs // 2)
    for length, pairs in ((64, 8), (256, 32), (512, 64), (1024, 128), (2048, 256))
)

trials = {
    "updates": Trial(
        probe(
            (_LAW,),
            (
                _LAW,
                dataclasses.replace(_LAW, updates=0),
                dataclasses.replace(_LAW, updates=8),
                dataclasses.replace(_LAW, length=128, pairs=16, updates=8),
                dataclasses.replace(_LAW, length=256, pairs=32, updates=16),
            ),
            512,
            B=128,
        )
    ),
    "updates@smoke": Trial(probe((_SMOKE,), (_SMOKE,), 128, B=128), steps=100),
    "updates@large": Trial(probe(_LARGE[:3], _LARGE, 1_000, B=128), steps=20_000, lr=3e-3, D=128),
}
