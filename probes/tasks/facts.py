"""Frozen facts: what follows a pair of words is the same for ever, and nothing but memory in the weights can tell it.

    a b F(a, b)  a b F(a, b)  ...        at b the label is F(a, b)

a and b are drawn anew each time, of words 0..vocab-1; F is drawn once, by `facts`, and is the same for training and
test. So the context holds nothing of use but the two words themselves: a model has as many facts to learn by heart as
there are pairs, vocab². Chance: 1 / vocab.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

_FACTS, _WORDS = range(2)  # streams of draws
_TRAIN, _TEST = range(2)


@dataclasses.dataclass(frozen=True)
class Facts(DataConfig):
    """B rows of T tokens a step, never the same row twice. facts: the seed of F. rows: held-out ones."""

    T: int = 48
    B: int = 32
    vocab: int = 64
    facts: int = 0
    rows: int = 128

    def __post_init__(self):
        super().__post_init__()
        if self.T % 3:
            raise DataError(f"Facts.T is {self.T}: a fact is three tokens, so it must be a multiple of 3")
        if self.vocab < 2:
            raise DataError(f"Facts.vocab is {self.vocab}: it must be at least 2")

    def build(self) -> "FactsDataset":
        return FactsDataset(self)


class FactsDataset(Dataset):
    config: Facts

    def __init__(self, config: Facts):
        self.config, W = config, config.vocab
        self.words, self.labelled = W, config.T // 3
        self.token_bytes = np.zeros([W], np.int32)
        self.digest = hashlib.sha256(f"facts 1: {config}".encode()).hexdigest()
        self.facts_WW = draws.integers(config.facts, _FACTS, np.arange(W), W, W).astype(np.int32)

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        index_B = (step * self.config.B + np.arange(self.config.B))[rows or slice(None)]
        return self._rows(draws.fold(_TRAIN, seed), index_B)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        firsts = range(0, self.config.rows, self.config.B)
        for first in firsts if batches is None else firsts[:batches]:
            index_B = np.arange(first, min(first + self.config.B, self.config.rows))[rows or slice(None)]
            yield self._rows(draws.fold(_TEST, 0), index_B)

    def _rows(self, seed: int, index_B: np.ndarray) -> Batch:
        B, T = len(index_B), self.config.T
        said = draws.integers(seed, _WORDS, index_B, 2 * T // 3, self.config.vocab).reshape(B, -1, 2).astype(np.int32)
        answer = self.facts_WW[said[..., 0], said[..., 1]]
        ids = np.concatenate([said, answer[..., None]], -1).reshape(B, T)
        labels = np.full_like(ids, NOT_ASKED)
        labels[:, 1::3] = answer
        return Batch(ids, np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)), labels)
