"""Selective copying, one of MAD's tasks (Poli et al. 2024, arXiv 2403.17844): say the tokens again, without the blanks.

    . . a . b . . . c . ! . . .        labels a b c at the last three blanks; `!` is vocab-1, `.` is vocab-2

`tokens` words, drawn with replacement from 0..vocab-3, stand in order among length - 2 · tokens - 1 blanks. Then comes
the copy token, and a blank to be filled for each word. What was said is not shown again: a model must know how many it
has said by counting.

`blanks`: each falls into one of the gaps at random: "before" some word (MAD: none after the last, which so stands right
before the copy token), or "anywhere", that gap too. (MAD draws these places from a generator that no seed of its own
reaches, so that its rows cannot be made again.)

To answer, a model stores words by their order and passes over blanks. Chance: 1 / (vocab - 2). Plateau: any of the
row's words, 1 / tokens and chance in the rest. Settings and figures: mad.py.
"""

import dataclasses
from typing import Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, empty, in_blocks, whole
from training.data import DataError

_WORDS, _GAPS = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Task):
    """vocab, length, tokens, blanks: the law, as above."""

    vocab: int = 16
    length: int = 256
    tokens: int = 16
    blanks: Literal["anywhere", "before"] = "anywhere"

    def __post_init__(self):
        one_of(self)
        whole(self, vocab=3, tokens=1)
        if self.length < 2 * self.tokens + 1:
            least = 2 * self.tokens + 1
            raise DataError(f"SelectiveCopy.length is {self.length}: to say {self.tokens} twice it needs {least}")

    @property
    def asked(self) -> int:
        return self.tokens

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - 2)

    @property
    def plateau(self) -> float:
        return 1 / self.tokens + (1 - 1 / self.tokens) / (self.vocab - 2)

    def harder(self) -> "SelectiveCopy | None":
        tokens = 2 * self.tokens
        return dataclasses.replace(self, tokens=tokens) if 2 * tokens < self.length else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, M, B = len(index_N), self.tokens, self.length - 2 * self.tokens - 1
        gaps = M + (self.blanks == "anywhere")
        word_NM = draws.integers(seed, _WORDS, index_N, M, self.vocab - 2)
        gap_NB = draws.integers(seed, _GAPS, index_N, B, gaps)
        gap_NB += np.arange(N)[:, None] * gaps
        blanks_NG = np.bincount(gap_NB.ravel(), minlength=N * gaps).reshape(N, gaps)
        place_NM = np.arange(M) + np.cumsum(blanks_NG, 1)[:, :M]
        ids_NT, labels_NT = empty(N, self.length)
        ids_NT[:] = self.vocab - 2
        np.put_along_axis(ids_NT, place_NM, word_NM.astype(np.int32), 1)
        ids_NT[:, -M - 1] = self.vocab - 1
        labels_NT[:, -M:] = word_NM
        pair_NM = np.tile(np.arange(M), [N, 1])
        distance_NM = self.length - M + pair_NM - place_NM
        return Rows(ids_NT, labels_NT, {"pair": pair_NM, "distance": distance_NM, "depth": place_NM})
