"""Dances: which of several named sequences came long ago is asked for by name, and said again from the start.

    name_2 m m m ... filler ... name_7 m m m ... filler ... name_2 m m m ...      labels: the moves of the last one

A text's form of the ballet of Lampinen et al. 2021 (arXiv 2105.14039): there an agent sees some dances, each followed
by a delay, and is asked for one. Each row has `dances` names of their own, of words 1..names, and for each `moves`
words of names+1..vocab-1, drawn anew; `delay` tokens 0 follow each. Then one of the names comes again and its moves
are asked for: the first at the name, each next one at the move before it. Chance: 1 / (vocab - names - 1).

Plateau: what completion without the name gives (`keyless`, probes/tasks/task.py), 0.75 of four dances of three moves: a
move or two tell which dance it is, however many different moves there are. So the share of whole dances (`exact`) is
the headline.
"""

import dataclasses

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, empty, keyless, whole
from training.data import DataError

_NAMES, _MOVES, _WHICH = range(3)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Dances(Task):
    """vocab, names, dances, moves, delay: the law, as above."""

    vocab: int = 48
    names: int = 15
    dances: int = 4
    moves: int = 8
    delay: int = 0

    def __post_init__(self):
        whole(self, dances=1, moves=1, delay=0)
        if not self.dances <= self.names < self.vocab - 2:
            raise DataError(f"Dances.names is {self.names}: it must be at least dances, and leave words for moves")

    @property
    def length(self) -> int:
        return self.dances * (1 + self.moves + self.delay) + self.moves

    @property
    def asked(self) -> int:
        return self.moves

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.names - 1)

    @property
    def plateau(self) -> float | None:
        return keyless(self.dances, self.moves, self.vocab - self.names - 1) if self.dances > 1 else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        N = len(index_N)
        name = 1 + draws.distinct(seed, _NAMES, index_N, self.dances, self.names)
        words = self.vocab - self.names - 1
        move = 1 + self.names + draws.integers(seed, _MOVES, index_N, self.dances * self.moves, words)
        move = move.reshape(N, self.dances, self.moves)
        which = draws.integers(seed, _WHICH, index_N, 1, self.dances)[:, 0]
        each = 1 + self.moves + self.delay
        ids, labels = empty(N, self.length)
        said = ids[:, : self.dances * each].reshape(N, self.dances, each)  # a copy: rows are not contiguous
        said[:, :, 0], said[:, :, 1 : 1 + self.moves] = name, move
        last = self.dances * each
        ids[:, :last] = said.reshape(N, -1)
        asked, answer = name[np.arange(N), which], move[np.arange(N), which]
        ids[:, last], ids[:, last + 1 :] = asked, answer[:, :-1]
        labels[:, last:] = answer
        depth = which[:, None] * each + 1 + np.arange(self.moves)
        about = {
            "answer": np.zeros([N, self.moves], np.int64),
            "depth": depth,
            "distance": last + np.arange(self.moves) - depth,
        }
        return Rows(ids, labels, about)


_LAW = Dances(vocab=64, names=16, moves=3)
_DELAYS = tuple(dataclasses.replace(_LAW, delay=delay) for delay in (1, 4, 16, 64))

trials = {
    "dances": Trial(
        Probe(B=64, train=tuple(Part(law) for law in _DELAYS[:2]), test=tuple(Part(law, 128) for law in _DELAYS)),
        steps=800,
    ),
    "dances@smoke": Trial(Probe(B=32, train=(Part(_LAW),), test=(Part(_LAW, 64),)), steps=60),
}
