"""Dances: which of several named sequences came long ago is asked for by name, and said again from the start.

    name_2 m m m ... filler ... name_7 m m m ... filler ... name_2 m m m ...      labels: the moves of the last one

A text's form of the ballet of Lampinen et al. 2021 (arXiv 2105.14039): there an agent sees some dances, each followed
by a delay, and is asked for one. Each row has `dances` names of their own, of words 1..names, and for each `moves`
words of names+1..vocab-1, drawn anew; `delay` tokens 0 follow each. Then one of the names comes again and its moves
are asked for: the first at the name, each next one at the move before it (a move says little by itself: it may occur
in each dance). Chance: 1 / (vocab - names - 1).
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

_NAMES, _MOVES, _WHICH = range(3)  # streams of draws
_TRAIN, _TEST = range(2)


@dataclasses.dataclass(frozen=True)
class Dances(DataConfig):
    """B rows a step, never the same row twice, all of one of the `delays` in turn.

    T: 0, or more than the longest row wants. tests: delays of held-out rows, `rows` of each.
    """

    T: int = 0
    B: int = 32
    vocab: int = 48
    names: int = 15
    dances: int = 4
    moves: int = 8
    delays: tuple[int, ...] = (0, 8)
    tests: tuple[int, ...] = (0, 8, 32)
    rows: int = 128

    def __post_init__(self):
        for name in ("dances", "moves"):
            if getattr(self, name) < 1:
                raise DataError(f"Dances.{name} is {getattr(self, name)}: it must be at least 1")
        if not self.delays or min(self.delays + self.tests) < 0:
            raise DataError(f"Dances.delays is {self.delays}, tests {self.tests}: give delays of at least 0")
        if not self.dances <= self.names < self.vocab - 2:
            raise DataError(f"Dances.names is {self.names}: it must be at least dances, and leave words for moves")
        longest = max(map(self.length, self.delays + self.tests))
        if 0 < self.T < longest:
            raise DataError(f"Dances.T is {self.T}: the longest delay needs {longest} (0 means just that)")
        object.__setattr__(self, "T", self.T or longest)
        super().__post_init__()

    def length(self, delay: int) -> int:
        return self.dances * (1 + self.moves + delay) + self.moves

    def build(self) -> "DancesDataset":
        return DancesDataset(self)


class DancesDataset(Dataset):
    config: Dances

    def __init__(self, config: Dances):
        self.config = config
        self.words, self.labelled = config.vocab, config.moves
        self.token_bytes = np.zeros([config.vocab], np.int32)
        self.digest = hashlib.sha256(f"dances 1: {config}".encode()).hexdigest()

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        index_B = (step * self.config.B + np.arange(self.config.B))[rows or slice(None)]
        delays = self.config.delays
        return self._rows(draws.fold(_TRAIN, seed), index_B, delays[step % len(delays)])

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        every = [batch for delay in self.config.tests for batch in self.questions(delay, rows)]
        yield from every if batches is None else every[:batches]

    def questions(self, delay: int, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out rows of a delay, B at a time."""
        for first in range(0, self.config.rows, self.config.B):
            index_B = np.arange(first, min(first + self.config.B, self.config.rows))[rows or slice(None)]
            yield self._rows(draws.fold(_TEST, delay), index_B, delay)

    def _rows(self, seed: int, index_B: np.ndarray, delay: int) -> Batch:
        c, B = self.config, len(index_B)
        name = 1 + draws.distinct(seed, _NAMES, index_B, c.dances, c.names)
        move = 1 + c.names + draws.integers(seed, _MOVES, index_B, c.dances * c.moves, c.vocab - c.names - 1)
        move = move.reshape(B, c.dances, c.moves)
        which = draws.integers(seed, _WHICH, index_B, 1, c.dances)[:, 0]
        said = np.zeros((B, c.dances, 1 + c.moves + delay), np.int32)
        said[:, :, 0], said[:, :, 1 : 1 + c.moves] = name, move
        asked, answer = name[np.arange(B), which], move[np.arange(B), which]
        ids, labels = np.zeros((B, c.T), np.int32), np.full((B, c.T), NOT_ASKED, np.int32)
        end, last = self.config.length(delay), said[0].size
        ids[:, :last] = said.reshape(B, -1)
        ids[:, last], ids[:, last + 1 : end] = asked, answer[:, :-1]
        labels[:, last:end] = answer
        pos = np.where(np.arange(c.T) < end, np.arange(c.T), -1).astype(np.int32)
        return Batch(ids, np.broadcast_to(pos, (B, c.T)), labels)
