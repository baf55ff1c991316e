"""Retention: facts are written once, other facts are then written again and again, and the first are asked for.

    k0 v0 k1 v1 | o0 w o1 w o0 w o1 w o1 w ... | k1 k0 (o1)      the label at each key is the last value it was given

A row says `facts` key-value pairs, then `updates` pairs of `others` other keys: each of these once, as far as updates
go, then one of them at random each time, always with another value than it has. Then all the first keys are asked for,
and with them `recent` of the other keys that were written, all in one random order; answers are not said. Keys are
different draws from 1..W/2-1, W = `vocab`; values are of W/2..W-1, those of the first facts different.

To answer, a memory must let a fact stand that nothing confirms while it writes others: where facts lie in weights, each
update moves them a little; where they lie in slots, it may take one over. Over `updates`, or over `since`, the updates
after a key was last written, accuracy is the curve of forgetting. Without `recent` a model may learn to write nothing
but a row's first pairs, and would forget nothing; with it the updates must be written too: train with, ask without.

Chance: 1 / (vocab - vocab/2), any value. Plateau, without `recent`: some value of the first facts, 1 / facts.
"""

import dataclasses
from typing import Any

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_KEYS, _VALUES, _WHICH, _NEW, _RECENT, _ORDER = range(6)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Retention(Task):
    """vocab, facts, updates, others, recent: the law, as above."""

    vocab: int = 256
    facts: int = 4
    updates: int = 16
    others: int = 4
    recent: int = 0

    def __post_init__(self):
        whole(self, facts=1, updates=0, others=1, recent=0)
        if self.recent > self.seen:
            raise DataError(f"Retention.recent is {self.recent}: at most {self.seen} of the other keys are written")
        least = 2 * (self.facts + self.others + 1)
        if self.vocab < least:
            raise DataError(f"Retention.vocab is {self.vocab}: so many different keys need at least {least}")

    @property
    def seen(self) -> int:
        """Other keys that are written."""
        return min(self.others, self.updates)

    @property
    def length(self) -> int:
        return 2 * (self.facts + self.updates) + self.asked

    @property
    def asked(self) -> int:
        return self.facts + self.recent

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.vocab // 2)

    @property
    def plateau(self) -> float | None:
        return None if self.recent else 1 / self.facts

    def rows(self, seed: int, index_N: Ints) -> Rows:
        # At least 64 rows in a block, however long: an update is one of all rows at once.
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, min(self.length, 1024))

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, facts, updates, others = len(index_N), self.facts, self.updates, self.others
        values = self.vocab - self.vocab // 2
        keys = 1 + draws.distinct(seed, _KEYS, index_N, facts + others, self.vocab // 2 - 1)
        said = np.empty([N, facts + updates, 2], np.int64)  # which key, and its value
        said[:, :facts, 0] = np.arange(facts)
        said[:, :facts, 1] = draws.distinct(seed, _VALUES, index_N, facts, values)
        said[:, facts:, 0] = facts + np.arange(updates)
        said[:, facts + others :, 0] = facts + draws.integers(seed, _WHICH, index_N, max(0, updates - others), others)
        # A key's first value is any; each next one is so much more than the last, modulo all values: never the same.
        more = np.where(np.arange(updates) < others, values, values - 1)
        new = draws.integers(seed, _NEW, index_N, updates, more) + (np.arange(updates) >= others)
        last = np.empty([facts + others, N], np.int64)  # which pair said a key last
        last[:facts] = np.arange(facts)[:, None]
        row_N = np.arange(N)
        for u in range(updates):
            which = said[:, facts + u, 0]
            before = said[row_N, last[which, row_N], 1] if u >= others else 0
            said[:, facts + u, 1] = (before + new[:, u]) % values
            last[which, row_N] = facts + u

        asked = np.broadcast_to(np.arange(facts), [N, facts])
        if self.recent:
            asked = np.concatenate([asked, facts + draws.distinct(seed, _RECENT, index_N, self.recent, self.seen)], 1)
        asked = np.take_along_axis(asked, draws.orders(seed, _ORDER, index_N, self.asked), 1)
        pair = last[asked, row_N[:, None]]
        ids, labels = empty(N, self.length)
        context = 2 * (facts + updates)
        ids[:, 0:context:2] = np.take_along_axis(keys, said[:, :, 0], 1)
        ids[:, 1:context:2] = self.vocab // 2 + said[:, :, 1]
        ids[:, context:] = np.take_along_axis(keys, asked, 1)
        labels[:, context:] = self.vocab // 2 + np.take_along_axis(said[:, :, 1], pair, 1)
        about = {"depth": 2 * pair, "distance": context + np.arange(self.asked) - 2 * pair}
        if self.recent:
            about["since"] = facts + updates - np.maximum(pair, facts - 1) - 1
        return Rows(ids, labels, about)


def _trial(
    train: tuple[int, ...], tests: tuple[int, ...], rows: int, vocab: int = 256, facts: int = 4, **trial: Any
) -> Trial:
    """Trained to keep all facts over some updates; asked for the first ones over more."""
    learnt = [Retention(vocab, facts, N, recent=min(N, 4)) for N in train]
    data = probe(learnt, [Retention(vocab, facts, N) for N in tests], rows, B=128)
    return Trial(data, watched=Retention(vocab, facts, train[-1]), **trial)


trials = {
    "retention": _trial((4, 8, 16), (0, 4, 8, 16, 32, 64, 128, 256), 512, steps=640),
    "retention@smoke": _trial((4,), (0, 4, 8), 128, steps=100),
    "retention@large": _trial(
        (16, 64, 256), (0, 16, 64, 256, 1024, 4096), 1_000, 8192, 16, steps=20_000, lr=3e-3, D=128
    ),
}
