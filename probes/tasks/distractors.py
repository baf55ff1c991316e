"""Recall past distractors: blocks of associative recall one after another; after the last, the first is asked for.

    k0 v0 k1 v1 | k2 v2 k3 v3 | k4 v4 k5 v5 | k1 k0      the label at each key of the last part is its value

A row holds `blocks` small rows of MQAR, of `pairs` key-value pairs each. Behind them the keys of the first are asked
for, each once, in random order; answers are not said. All keys of a row are different draws from 1..W/2-1 and all
values different draws from W/2..W-1, W = `vocab`: nothing is ever bound again, so whatever is lost was lost to what was
written after it.

`between`: "facts", blocks only say their pairs; "asked", every block, the first too, asks for its own keys right behind
its pairs, in random order: other tasks are done while the first facts wait.

To answer, a model must keep the first block's pairs while it writes the others': over `blocks`, or over `since`, the
blocks said between a fact's own and its question, accuracy shows interference and decay. A memory that routes what is
said to slots of its own may isolate the blocks.

Chance: 1 / (vocab - vocab/2), any value. Plateau: some value that the row has said before the question.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_KEYS, _VALUES, _ORDER, _LAST = range(4)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Distractors(Task):
    """vocab, pairs, blocks, between: the law, as above."""

    vocab: int = 256
    pairs: int = 4
    blocks: int = 4
    between: Literal["facts", "asked"] = "facts"

    def __post_init__(self):
        one_of(self)
        whole(self, pairs=1, blocks=1)
        if self.vocab < 2 * self.facts + 2:
            raise DataError(
                f"Distractors.vocab is {self.vocab}: {self.facts} different keys and values need at least "
                f"{2 * self.facts + 2}"
            )

    @property
    def facts(self) -> int:
        return self.pairs * self.blocks

    @property
    def each(self) -> int:
        """Tokens of a block."""
        return self.pairs * (3 if self.between == "asked" else 2)

    @property
    def length(self) -> int:
        return self.blocks * self.each + self.pairs

    @property
    def asked(self) -> int:
        return self.pairs + (self.facts if self.between == "asked" else 0)

    @property
    def chance(self) -> float:
        return 1 / (self.vocab - self.vocab // 2)

    @property
    def plateau(self) -> float:
        last = 1 / self.facts
        if self.between == "facts":
            return last
        return float(np.mean([1 / (self.pairs * r) for r in range(1, self.blocks + 1)] + [last]))

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, n, R, each = len(index_N), self.pairs, self.blocks, self.each
        keys = 1 + draws.distinct(seed, _KEYS, index_N, self.facts, self.vocab // 2 - 1)
        values = self.vocab // 2 + draws.distinct(seed, _VALUES, index_N, self.facts, self.vocab - self.vocab // 2)
        ids, labels = empty(N, self.length)
        said = ids[:, : R * each].reshape(N, R, each)
        said[:, :, 0 : 2 * n : 2] = keys.reshape(N, R, n)
        said[:, :, 1 : 2 * n : 2] = values.reshape(N, R, n)
        # Questions by place: which pair each asks for, where it stands, and which block is the last before it.
        pair, place, after = draws.orders(seed, _LAST, index_N, n), np.arange(n) + R * each, np.full([n], R - 1)
        if self.between == "asked":
            order = np.stack([draws.orders(draws.fold(seed, r), _ORDER, index_N, n) for r in range(R)], 1)
            own = order + np.arange(R)[:, None] * n
            pair = np.concatenate([own.reshape(N, -1), pair], 1)
            place = np.concatenate([(np.arange(R)[:, None] * each + 2 * n + np.arange(n)).ravel(), place])
            after = np.concatenate([np.repeat(np.arange(R), n), after])
        ids[:, : R * each] = said.reshape(N, -1)
        ids[:, place] = np.take_along_axis(keys, pair, 1)
        labels[:, place] = np.take_along_axis(values, pair, 1)
        depth = pair // n * each + pair % n * 2
        about = {"depth": depth, "distance": place - depth}
        if self.between == "asked" and R > 1:
            about["since"] = after - pair // n
        return Rows(ids, labels, about)


def _probe(train: tuple[int, ...], tests: tuple[int, ...], rows: int, **law: Any) -> Probe:
    learnt, asked = ([Distractors(blocks=count, **law) for count in counts] for counts in (train, tests))
    return probe(learnt, asked, rows, B=128)


trials = {
    "distractors": Trial(_probe((1, 2, 4), (1, 2, 4, 8, 16), 512)),
    "distractors@smoke": Trial(_probe((2,), (1, 2, 4), 128), steps=100),
    "distractors@asked": Trial(_probe((4,), (4, 8, 16), 512, between="asked")),
    "distractors@large": Trial(
        _probe((4, 16), (1, 4, 16, 64), 1_000, pairs=16, vocab=8192), steps=20_000, lr=3e-3, D=128
    ),
}
