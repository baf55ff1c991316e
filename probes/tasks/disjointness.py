"""Set disjointness, by the law of JRT's synthetic study (Arora et al. 2024, arXiv 2407.05483): which token is in both
of two sets?

    1 a a a a 2 b b b b b b b b 3        at the 3 the label is the one token that is in both

Words 0..3 are marks (0 is never said), the others are tokens. A row has a set of m tokens and then one of n. All m + n
are different draws; then one token of the first set, at random, takes a random place of the second. (The paper splits
the vocabulary at random into halves and draws a set from either, which is the same law.)

A model that reads on must keep the first set to find what the second shares with it; one that knows the second set
while it reads the first (or reads both sets twice) may keep whichever is smaller: that is what the task is for.

`reading`: "once"; "twice", the whole row and then again, `1 a 2 b 3 1 a 2 b 3`, asked at the end (JRT-prompt);
"ahead", once, all but the 3 a region that is read ahead (JRT-RNN).

Chance: 1 / (vocab - 4), any token; plateau: 1 / min(m, n), some token of the smaller set.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, whole
from training.data import NOT_ASKED, DataError

Sizes = tuple[tuple[int, int], ...]  # (tokens of the first set, of the second)
Reading = Literal["once", "twice", "ahead"]
MARKS = 4
_TOKENS, _SHARED, _PLACE = range(3)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Disjointness(Task):
    """vocab, reading: the law, as above. first, second: tokens of the two sets, m and n."""

    vocab: int = 2048
    first: int = 4
    second: int = 16
    reading: Reading = "once"

    def __post_init__(self):
        one_of(self)
        whole(self, first=1, second=1)
        large = max(self.first, self.second)
        if 2 * large > self.vocab - MARKS:
            raise DataError(
                f"Disjointness.vocab is {self.vocab}: a set of {large} needs twice as many and {MARKS} marks"
            )

    @property
    def length(self) -> int:
        return (self.first + self.second + 3) * (2 if self.reading == "twice" else 1)

    @property
    def asked(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - MARKS)

    @property
    def plateau(self) -> float:
        return 1 / min(self.first, self.second)

    @property
    def region(self) -> int:
        return self.length - 1 if self.reading == "ahead" else 0

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N, m, n = len(index_N), self.first, self.second
        tokens = MARKS + draws.distinct(seed, _TOKENS, index_N, m + n, self.vocab - MARKS)
        shared = draws.integers(seed, _SHARED, index_N, 1, m)
        place = draws.integers(seed, _PLACE, index_N, 1, n)
        answer = np.take_along_axis(tokens, shared, 1)
        np.put_along_axis(tokens, m + place, answer, 1)
        marks = [np.full([N, 1], mark) for mark in (1, 2, 3)]
        row = np.concatenate([marks[0], tokens[:, :m], marks[1], tokens[:, m:], marks[2]], 1).astype(np.int32)
        row = np.tile(row, (1, 2)) if self.reading == "twice" else row
        labels = np.full(row.shape, NOT_ASKED, np.int32)
        labels[:, -1] = answer[:, 0]
        # The row whole is read before the question where it is read twice: its last telling counts. The evidence is the
        # token's place in either set.
        begin, about = self.length - (m + n + 3), {}
        if m > 1:
            about["depth"] = begin + 1 + shared
        if n > 1:
            about["distance"] = self.length - 1 - (begin + 2 + m + place)
        return Rows(row, labels, about)


def mirrored(*sizes: tuple[int, int]) -> Sizes:
    return tuple(pair for m, n in sizes for pair in ((m, n), (n, m)))


def parts(sizes: Sizes, rows: int, **law: Any) -> tuple[Part, ...]:
    return tuple(Part(Disjointness(first=m, second=n, **law), rows) for m, n in sizes)


# The paper's: it trains on 20,000 rows of each for 48 epochs and tests on 1,000 of each.
PAPER_TRAIN = mirrored((4, 16), (8, 32), (64, 16), (4, 128), (16, 256), (4, 256))
PAPER_TEST = mirrored(
    (1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)
)
_SMALL = mirrored((4, 16), (8, 32))

trials = {
    "disjointness": Trial(
        Probe(
            B=64,
            train=parts(_SMALL, 0, vocab=256),
            test=parts((*_SMALL, *mirrored((4, 64))), 128, vocab=256),
        ),
        steps=800,
        blocks=2,
    ),
    "disjointness@smoke": Trial(
        Probe(B=32, train=parts(_SMALL[:2], 0, vocab=64), test=parts(_SMALL[:2], 64, vocab=64)), steps=60
    ),
    "disjointness@paper": Trial(
        Probe(B=128, train=parts(PAPER_TRAIN, 20_000), test=parts(PAPER_TEST, 1_000)),
        steps=48 * 12 * 157,
        lr=5e-4,
        blocks=2,
    ),
    "twice": Trial(
        Probe(
            B=64,
            train=parts(_SMALL, 0, vocab=256, reading="twice"),
            test=parts((*_SMALL, *mirrored((4, 64))), 128, vocab=256, reading="twice"),
        ),
        steps=720,
        blocks=2,
        about="Set disjointness, the row read twice before the question (JRT-prompt).",
    ),
}
