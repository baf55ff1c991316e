"""Order recall, after SORT (Pink et al. 2024, arXiv 2410.08133), of tokens: which of two pieces of a text came first?

    w w a b c d w w w w w e f g h w w  ASK e f g h OR a b c d IS      the label: B, the second one shown came first

A row is an excerpt of uniform words, then two of its segments, of `segment` tokens each, in an order that is as likely
either way. At the IS the label is A or B: whether the one shown first, or second, began earlier in the excerpt. The
segments do not overlap: their starts lie `near` to `far` tokens apart, each distance as likely, and each place in the
excerpt that allows it.

To answer, a model must keep not only what was said but when: a memory that holds a text as a set of bindings cannot
tell. Laws of one `near` and `far` each ask by distance; `depth` is the start of the earlier segment, `distance` counts
from the later one's to the question. A segment of 4 of 64 words stands a second time in an excerpt of 128 in one row of
70,000.

Chance: 1 / 2. No plateau. SORT's excerpts have 250 to 20,000 words of nine books and segments of 20 or 50. From memory,
not checked: people are right in 0.7 of the questions by long-term memory, language models well above chance with short
excerpts before them and near it with long ones.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_WORDS, _APART, _PLACE, _SHOWN = range(4)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Order(Task):
    """excerpt, segment, near, far: the law, as above; 0 for the least and the most that can be. words: how many.

    Tokens are words, ASK, OR, IS, A and B in this order.
    """

    excerpt: int = 128
    segment: int = 4
    near: int = 0
    far: int = 0
    words: int = 64

    def __post_init__(self):
        whole(self, segment=1, near=0, far=0, words=2)
        if self.excerpt < 2 * self.segment:
            raise DataError(f"Order.excerpt is {self.excerpt}: two segments need at least {2 * self.segment}")
        low, high = self.apart
        if low < self.segment:
            raise DataError(
                f"Order.near is {self.near}: it must be at least segment, {self.segment} (0 means just that)"
            )
        if not low <= high <= self.excerpt - self.segment:
            most = self.excerpt - self.segment
            raise DataError(f"Order.far is {self.far}: it must be from {low} to {most} (0 means just that)")

    @property
    def apart(self) -> tuple[int, int]:
        """The least and the most tokens from start to start."""
        return self.near or self.segment, self.far or self.excerpt - self.segment

    @property
    def vocab(self) -> int:
        return self.words + 5

    @property
    def length(self) -> int:
        return self.excerpt + 2 * self.segment + 3

    @property
    def asked(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 0.5

    @property
    def says(self) -> dict[str, Any]:
        low, high = self.apart
        return {"excerpt": self.excerpt, "segment": self.segment, "apart": f"{low} to {high}", "words": self.words}

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, E, S = len(index_N), self.excerpt, self.segment
        low, high = self.apart
        apart = low + draws.integers(seed, _APART, index_N, 1, high - low + 1)
        start = draws.integers(seed, _PLACE, index_N, 1, E - S - apart + 1)
        shown = draws.integers(seed, _SHOWN, index_N, 1, 2)  # 1: the later one is shown first
        ids, labels = empty(N, self.length)
        ids[:, :E] = draws.integers(seed, _WORDS, index_N, E, self.words)
        ids[:, E], ids[:, E + 1 + S], ids[:, -1] = self.words, self.words + 1, self.words + 2
        for first, place in ((shown, E + 1), (1 - shown, E + 2 + S)):
            ids[:, place : place + S] = np.take_along_axis(ids[:, :E], start + first * apart + np.arange(S), 1)
        labels[:, -1:] = self.words + 3 + shown
        return Rows(ids, labels, {"distance": E - start - apart, "depth": start})


def _probe(
    train: tuple[int, ...], tests: tuple[int, ...], rows: int, segment: int = 4, words: int = 64, B: int = 64
) -> Probe:
    """Trained on some excerpts; asked of all, and of the longest of training by distance too."""
    E = max(train)
    edges = [segment, E // 8, E // 4, E // 2, E - segment + 1]
    bins = [Order(E, segment, near, end - 1, words) for near, end in itertools.pairwise(edges)]
    learnt, asked = ([Order(excerpt, segment, words=words) for excerpt in some] for some in (train, tests))
    return probe(learnt, asked + bins, rows, B)


trials = {
    "order": Trial(_probe((32, 64), (32, 64, 128, 256, 512), 256, B=32), steps=1_600, lr=3e-3, blocks=2, mlp=True),
    "order@smoke": Trial(_probe((64,), (64,), 64), steps=100, blocks=2, mlp=True),
    "order@large": Trial(
        _probe((250, 1000), (250, 1000, 2500, 10_000, 20_000), 990, segment=20, words=1024),
        steps=20_000,
        lr=1e-3,
        D=128,
        blocks=2,
        mlp=True,
    ),
}
