"""Memorisation, one of MAD's tasks (Poli et al. 2024, arXiv 2403.17844): facts of the data, not of the row.

    k3 ! k7 ! k3 ! k1 !       the label at each `!`, vocab-1, is the value of the key before it

One map sends each of (vocab-1)//2 keys to a value of its own, drawn from the rest of the words but `!` (one more, where
vocab is even). It is a field of the law (`map`, a seed), the same for every row, trained or asked; a row says only
keys, drawn with replacement, and no value. New rows ask for the same facts in another order.

To answer, a model has the map in its weights. Chance: 1 / keys, which is how often two rows ask for the same. No
plateau, for a row says no value. Settings and figures: mad.py.
"""

import dataclasses
import functools

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, empty, whole
from training.data import DataError

_KEYS, _MAP = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Memorize(Task):
    """vocab, length: the law, as above. map: seed of the map from keys to values."""

    vocab: int = 256
    length: int = 32
    map: int = 12345

    def __post_init__(self):
        whole(self, vocab=5, length=2)
        if self.length % 2:
            raise DataError(f"Memorize.length is {self.length}: it must be even, a question is two tokens")

    @property
    def keys(self) -> int:
        return (self.vocab - 1) // 2

    @property
    def asked(self) -> int:
        return self.length // 2

    @property
    def chance(self) -> float:
        return 1 / self.keys

    def value_of(self) -> Ints:
        """The value of each key: int64 [keys]."""
        return _map(self.map, self.keys, self.vocab - 1 - self.keys)

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N, Q = len(index_N), self.length // 2
        ids_NT, labels_NT = empty(N, self.length)
        key_NQ = draws.integers(seed, _KEYS, index_N, Q, self.keys)
        ids_NT[:, ::2] = key_NQ
        ids_NT[:, 1::2] = self.vocab - 1
        labels_NT[:, 1::2] = self.value_of()[key_NQ]
        return Rows(ids_NT, labels_NT, {"slot": np.tile(np.arange(Q), [N, 1])})


@functools.lru_cache(8)
def _map(seed: int, keys: int, values: int) -> Ints:
    return keys + draws.permutation(seed, _MAP, values)[:keys]
