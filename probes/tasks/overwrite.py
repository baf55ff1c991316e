"""Overwrite recall: keys are told new values again and again, and the last one counts.

    k3 v1 k7 v4 k3 v9 k3 v2 ...        at a key that was told before, the label is what it was told last

Each row has `keys` keys of its own, of words 1..vocab/2-1; every statement draws one of them and a value of
vocab/2..vocab-1. A statement is a question too: its key asks for the value before the new one is told. From one
statement of a key to the next there are 2 · keys tokens on average (geometric), whatever the length of the row: what a
memory must do is not to hold more, but to forget well. Chance: 2 / vocab.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

_KEYS, _WHICH, _VALUES = range(3)  # streams of draws
_TRAIN, _TEST = range(2)


@dataclasses.dataclass(frozen=True)
class Overwrite(DataConfig):
    """B rows of T tokens a step, never the same row twice. tests: lengths of held-out rows, `rows` of each."""

    T: int = 64
    B: int = 64
    vocab: int = 64
    keys: int = 16
    tests: tuple[int, ...] = (64,)
    rows: int = 256

    def __post_init__(self):
        super().__post_init__()
        for T in (self.T, *self.tests):
            if T % 2:
                raise DataError(f"Overwrite: a row of {T} tokens: it must be even, a statement is two tokens")
        if not 1 <= self.keys < self.vocab // 2:
            raise DataError(f"Overwrite.keys is {self.keys}: it must be at least 1 and below vocab / 2")

    def build(self) -> "OverwriteDataset":
        return OverwriteDataset(self)


class OverwriteDataset(Dataset):
    config: Overwrite

    def __init__(self, config: Overwrite):
        self.config = config
        self.words = config.vocab
        self.token_bytes = np.zeros([config.vocab], np.int32)
        self.digest = hashlib.sha256(f"overwrite 1: {config}".encode()).hexdigest()

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        index_B = (step * self.config.B + np.arange(self.config.B))[rows or slice(None)]
        return self._rows(draws.fold(_TRAIN, seed), index_B, self.config.T)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """Batches of one length each, padded to the longest."""
        count = 0
        for T in self.config.tests:
            for batch in self.questions(T, rows):
                if count == batches:
                    return
                count += 1
                pad = [(0, 0), (0, max(self.config.tests) - T)]
                yield Batch(
                    np.pad(batch.ids_BT, pad),
                    np.pad(batch.pos_BT, pad, constant_values=-1),
                    np.pad(batch.labels_BT, pad, constant_values=NOT_ASKED),
                )

    def questions(self, T: int, rows: slice | None = None) -> Iterator[Batch]:
        """The held-out rows of a length, B at a time."""
        for first in range(0, self.config.rows, self.config.B):
            index_B = np.arange(first, min(first + self.config.B, self.config.rows))[rows or slice(None)]
            yield self._rows(draws.fold(_TEST, T), index_B, T)

    def _rows(self, seed: int, index_N: npt.NDArray[np.int64], T: int) -> Batch:
        c, N, S = self.config, len(index_N), T // 2
        own_NK = 1 + draws.distinct(seed, _KEYS, index_N, c.keys, c.vocab // 2 - 1)
        which_NS = draws.integers(seed, _WHICH, index_N, S, c.keys)
        value_NS = c.vocab // 2 + draws.integers(seed, _VALUES, index_N, S, c.vocab - c.vocab // 2)
        last_NK = np.full([N, c.keys], NOT_ASKED, np.int64)
        ids_NT, labels_NT = np.zeros([N, T], np.int32), np.full([N, T], NOT_ASKED, np.int32)
        row_N = np.arange(N)
        for s in range(S):
            which_N = which_NS[:, s]
            labels_NT[:, 2 * s] = last_NK[row_N, which_N]
            last_NK[row_N, which_N] = value_NS[:, s]
        ids_NT[:, 0::2] = np.take_along_axis(own_NK, which_NS, 1)
        ids_NT[:, 1::2] = value_NS
        return Batch(ids_NT, np.broadcast_to(np.arange(T, dtype=np.int32), (N, T)), labels_NT)


def gaps(batch: Batch) -> npt.NDArray[np.int64]:
    """At each question the tokens since its key was told last, else 0; [B, T]."""
    ids, labels = np.asarray(batch.ids_BT), np.asarray(batch.labels_BT)
    gap = np.zeros(ids.shape, np.int64)
    for b in range(len(ids)):
        told: dict[int, int] = {}
        for t in range(0, ids.shape[1], 2):
            if labels[b, t] != NOT_ASKED:
                gap[b, t] = t - told[ids[b, t]]
            told[ids[b, t]] = t
    return gap
