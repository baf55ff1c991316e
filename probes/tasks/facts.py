"""Frozen facts: what follows a pair of words is the same for ever, and nothing but memory in the weights can tell it.

    a b F(a, b)  a b F(a, b)  ...        at b the label is F(a, b)

a and b are drawn anew each time, of words 0..vocab-1; F is drawn once, by `facts`, and is the same for training and
test. So the context holds nothing of use but the two words themselves: a model has as many facts to learn by heart as
there are pairs, vocab². Chance: what another fact has, a little above 1 / vocab, for F's words are not equally many.
"""

import dataclasses
import functools

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Int32s, Ints, Part, Probe, Rows, Task, Trial, empty, whole
from training.data import DataError

_FACTS, _WORDS = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Facts(Task):
    """vocab, length: the law, as above. facts: the seed of F."""

    vocab: int = 64
    length: int = 48
    facts: int = 0

    def __post_init__(self):
        whole(self, vocab=2, length=3)
        if self.length % 3:
            raise DataError(f"Facts.length is {self.length}: a fact is three tokens, so it must be a multiple of 3")

    @property
    def asked(self) -> int:
        return self.length // 3

    @property
    def chance(self) -> float:
        """Of a word that another fact has: as likely as F's words repeat."""
        share = np.bincount(self.facts_WW.ravel(), minlength=self.vocab) / self.vocab**2
        return float(np.sum(share**2))

    @functools.cached_property
    def facts_WW(self) -> Int32s:
        W = self.vocab
        return draws.integers(self.facts, _FACTS, np.arange(W), W, W).astype(np.int32)

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N, Q = len(index_N), self.asked
        said = draws.integers(seed, _WORDS, index_N, 2 * Q, self.vocab).reshape(N, Q, 2)
        answer = self.facts_WW[said[..., 0], said[..., 1]]
        ids, labels = empty(N, self.length)
        ids[:, 0::3], ids[:, 1::3], ids[:, 2::3] = said[..., 0], said[..., 1], answer
        labels[:, 1::3] = answer
        return Rows(ids, labels, {})


_LAW = Facts()

trials = {
    "facts": Trial(Probe(B=32, train=(Part(_LAW),), test=(Part(_LAW, 128),)), lr=3e-3, mlp=True, conv=False, goal=0.9),
    "facts@smoke": Trial(
        Probe(B=32, train=(Part(Facts(vocab=8)),), test=(Part(Facts(vocab=8), 64),)), steps=60, mlp=True, goal=0.9
    ),
}
