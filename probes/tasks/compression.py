"""Compression, one of MAD's tasks (Poli et al. 2024, arXiv 2403.17844): a row of random words in one vector.

    a b c d ... !       labels a b c d ... at their own places; `!`, vocab-1, has none

length - 1 words, uniform in 0..vocab-2, and the token that says: now. Every label is answered from the last place's
vector alone, together with the place that is asked for (`bottleneck`). MAD adds sines and cosines of the place to the
vector and decodes it by an MLP of two layers; it asks for the `!` too, which says nothing.

To answer, a model packs (length - 1) · log2(vocab - 1) bits into the vector of one place. Chance: 1 / (vocab - 1). No
plateau: an early word's share right against a late one's tells how the memory forgets. Settings and figures: mad.py.
"""

import dataclasses

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, empty, whole

_WORDS = 0  # stream of draws


@dataclasses.dataclass(frozen=True)
class Compression(Task):
    """vocab, length: the law, as above."""

    vocab: int = 16
    length: int = 32

    def __post_init__(self):
        whole(self, vocab=3, length=2)

    @property
    def asked(self) -> int:
        return self.length - 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 1)

    @property
    def bottleneck(self) -> bool:
        return True

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N, Q = len(index_N), self.length - 1
        ids_NT, labels_NT = empty(N, self.length)
        ids_NT[:, :Q] = labels_NT[:, :Q] = draws.integers(seed, _WORDS, index_N, Q, self.vocab - 1)
        ids_NT[:, Q] = self.vocab - 1
        return Rows(ids_NT, labels_NT, {"depth": np.tile(np.arange(Q), [N, 1])})
