"""Set disjointness, by the law of JRT's synthetic study (Arora et al. 2024, arXiv 2407.05483): which token is in both
of two sets?

    1 a a a a 2 b b b b b b b b 3        at the 3 the label is the one token that is in both

Words 0..3 are marks (0 is never said), the others are tokens. A row has a set of m tokens and then one of n. All m + n
are different draws; then one token of the first set, at random, takes a random place of the second. (The paper splits
the vocabulary at random into halves and draws a set from either, which is the same law.)

A model that reads on must keep the first set to find what the second shares with it; one that knows the second set
while it reads the first (or reads both sets twice) may keep whichever is smaller: that is what the task is for.

`reading`: "once"; "twice", the whole row and then again, `1 a 2 b 3 1 a 2 b 3`, asked at the end (JRT-prompt);
"ahead", once, all but the 3 a region that is read ahead (JRT-RNN). Chance: 1 / (vocab - 4) for any token, 1 / min(m, n)
for some token of the smaller set.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from layers.layer import one_of
from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

Sizes = tuple[tuple[int, int], ...]  # (tokens of the first set, of the second)
MARKS = 4
_TOKENS, _SHARED, _PLACE = range(3)  # streams of draws
_TRAIN, _TEST = range(2)


def mirrored(*sizes: tuple[int, int]) -> Sizes:
    return tuple(pair for m, n in sizes for pair in ((m, n), (n, m)))


# The paper's, with a vocabulary of 2,048; it trains on 20,000 rows of each for 48 epochs and tests on 1,000 of each.
PAPER_TRAIN = mirrored((4, 16), (8, 32), (64, 16), (4, 128), (16, 256), (4, 256))
PAPER_TEST = mirrored(
    (1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)
)


@dataclasses.dataclass(frozen=True)
class Disjointness(DataConfig):
    """B rows a step, never the same row twice, all of one of the `sizes` in turn.

    T: 0, or more than the longest row wants. tests: sizes of held-out rows, `rows` of each.
    """

    T: int = 0
    B: int = 128
    vocab: int = 2048
    sizes: Sizes = PAPER_TRAIN
    tests: Sizes = PAPER_TEST
    reading: Literal["once", "twice", "ahead"] = "once"
    rows: int = 1000

    def __post_init__(self):
        one_of(self)
        if not self.sizes or not self.tests:
            raise DataError("Disjointness.sizes or tests is empty: give at least one pair of sizes")
        for m, n in self.sizes + self.tests:
            if min(m, n) < 1:
                raise DataError(f"Disjointness.sizes has a set of {min(m, n)} tokens: give at least 1")
            if 2 * max(m, n) > self.vocab - MARKS:
                raise DataError(
                    f"Disjointness.vocab is {self.vocab}: a set of {max(m, n)} needs twice as many and {MARKS} marks"
                )
        if self.rows < 1:
            raise DataError(f"Disjointness.rows is {self.rows}: it must be at least 1")
        longest = max(self.length(*pair) for pair in self.sizes + self.tests)
        if 0 < self.T < longest:
            raise DataError(f"Disjointness.T is {self.T}: the longest row needs {longest} (0 means just that)")
        object.__setattr__(self, "T", self.T or longest)
        super().__post_init__()

    def length(self, m: int, n: int) -> int:
        return (m + n + 3) * (2 if self.reading == "twice" else 1)

    def build(self) -> "DisjointnessDataset":
        return DisjointnessDataset(self)


class DisjointnessDataset(Dataset):
    config: Disjointness

    def __init__(self, config: Disjointness):
        self.config = config
        self.words, self.labelled = config.vocab, 1
        self.prefix = config.T if config.reading == "ahead" else 0
        self.token_bytes = np.zeros([config.vocab], np.int32)
        self.digest = hashlib.sha256(f"disjointness 1: {config}".encode()).hexdigest()

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        index_B = (step * self.config.B + np.arange(self.config.B))[rows or slice(None)]
        sizes = self.config.sizes
        return self._rows(draws.fold(_TRAIN, seed), index_B, *sizes[step % len(sizes)])

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """Batches of one pair of sizes each, the pairs by turns."""
        firsts = range(0, self.config.rows, self.config.B)
        turns = [(first, pair) for first in firsts for pair in self.config.tests]
        for first, (m, n) in turns if batches is None else turns[:batches]:
            yield self._asked(m, n, first, rows)

    def questions(self, m: int, n: int, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out rows of a pair of sizes, B at a time."""
        for first in range(0, self.config.rows, self.config.B):
            yield self._asked(m, n, first, rows)

    def _asked(self, m: int, n: int, first: int, rows: slice | None) -> Batch:
        index_B = np.arange(first, min(first + self.config.B, self.config.rows))[rows or slice(None)]
        return self._rows(draws.fold(_TEST, m, n), index_B, m, n)

    def _rows(self, seed: int, index_N: np.ndarray, m: int, n: int) -> Batch:
        c, N = self.config, len(index_N)
        tokens = MARKS + draws.distinct(seed, _TOKENS, index_N, m + n, c.vocab - MARKS)
        shared = draws.integers(seed, _SHARED, index_N, 1, m)
        place = draws.integers(seed, _PLACE, index_N, 1, n)
        answer = np.take_along_axis(tokens, shared, 1)
        np.put_along_axis(tokens, m + place, answer, 1)
        marks = [np.full([N, 1], mark) for mark in (1, 2, 3)]
        row = np.concatenate([marks[0], tokens[:, :m], marks[1], tokens[:, m:], marks[2]], 1)
        row = np.tile(row, (1, 2)) if c.reading == "twice" else row
        end = row.shape[1]
        ids, labels = np.zeros([N, c.T], np.int32), np.full([N, c.T], NOT_ASKED, np.int32)
        ids[:, :end], labels[:, end - 1] = row, answer[:, 0]
        place_T = np.arange(c.T, dtype=np.int32)
        pos = np.broadcast_to(np.where(place_T < end, place_T, np.int32(-1)), (N, c.T))
        ahead = np.broadcast_to(place_T < end - 1, (N, c.T)) if c.reading == "ahead" else None
        return Batch(ids, pos, labels, ahead)
