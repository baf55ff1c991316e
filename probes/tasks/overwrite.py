"""Overwrite recall: keys are told new values again and again, and the last one counts.

    k3 v1 k7 v4 k3 v9 k3 v2 ...        at a key that was told before, the label is what it was told last

Each row has `keys` keys of its own, of words 1..vocab/2-1; every statement draws one of them and a value of
vocab/2..vocab-1. A statement is a question too: its key asks for the value before the new one is told. From one
statement of a key to the next there are 2 · keys tokens on average (geometric), whatever the length of the row: what a
memory must do is not to hold more, but to forget well. Chance: 1 / (vocab - vocab/2). Plateau: any key's current value,
1 / keys and by chance in the rest, once all keys are told (0.34 of 4 keys and 8 values; a little more before).
"""

import dataclasses

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, by_question, empty, whole
from training.data import DataError

_KEYS, _WHICH, _VALUES = range(3)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Overwrite(Task):
    """vocab, keys: the law, as above. length: tokens of a row."""

    vocab: int = 64
    length: int = 64
    keys: int = 16

    def __post_init__(self):
        whole(self, length=4)
        if self.length % 2:
            raise DataError(f"Overwrite.length is {self.length}: it must be even, a statement is two tokens")
        if not 1 <= self.keys < self.vocab // 2:
            raise DataError(f"Overwrite.keys is {self.keys}: it must be at least 1 and below vocab / 2")
        if self.keys > 1 << 16:
            raise DataError(f"Overwrite.keys is {self.keys}: it must be at most {1 << 16}")

    @property
    def asked(self) -> int:
        return self.length // 2 - 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.vocab // 2)

    @property
    def plateau(self) -> float:
        return 1 / self.keys + (1 - 1 / self.keys) * self.chance

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N, S = len(index_N), self.length // 2
        own_NK = 1 + draws.distinct(seed, _KEYS, index_N, self.keys, self.vocab // 2 - 1)
        which_NS = draws.integers(seed, _WHICH, index_N, S, self.keys)
        value_NS = self.vocab // 2 + draws.integers(seed, _VALUES, index_N, S, self.vocab - self.vocab // 2)
        ids_NT, labels_NT = empty(N, self.length)
        ids_NT[:, 0::2] = np.take_along_axis(own_NK, which_NS, 1)
        ids_NT[:, 1::2] = value_NS
        # Sorted by (key, time), the statement before a statement is the one that it asks for.
        order = np.argsort(which_NS * S + np.arange(S), axis=1)
        key = np.take_along_axis(which_NS, order, 1)
        before_NS = np.full([N, S], -1)
        again = np.where(key[:, 1:] == key[:, :-1], order[:, :-1], -1)
        np.put_along_axis(before_NS, order[:, 1:], again, 1)
        told = before_NS >= 0
        labels_NT[:, 0::2][told] = np.take_along_axis(value_NS, before_NS, 1)[told]
        gap_NS = 2 * (np.arange(S) - before_NS)
        # Keys by the order in which the row tells them.
        nth_NS, nth_NK = np.cumsum(~told, 1) - 1, np.zeros([N, self.keys], np.int64)
        nth_NK[np.nonzero(~told)[0], which_NS[~told]] = nth_NS[~told]
        pair_NS = np.take_along_axis(nth_NK, which_NS, 1)
        return Rows(ids_NT, labels_NT, by_question(told, self.asked, pair=pair_NS, distance=gap_NS))


_LAW = Overwrite(vocab=16, keys=4)
_LONG = tuple(Part(dataclasses.replace(_LAW, length=64 << k), 128 >> k) for k in range(5))

trials = {
    "overwrite": Trial(Probe(B=32, train=(Part(_LAW),), test=_LONG)),
    "overwrite@smoke": Trial(Probe(B=32, train=(Part(_LAW),), test=(Part(_LAW, 64),)), steps=60),
}
