"""In-context recall and its noisy form, two of MAD's tasks (Poli et al. 2024, arXiv 2403.17844).

A row says key-value pairs, keys drawn again and again; a key keeps its value within a row. At a key that was said
before, the label is its value, which is also the next token:

    k3 v1 | k7 v4 | n2 n9 | k3 v1 | ... | k7 v4      asked: the second k3 and, as ever, the last key

* Words: keys, then values, as many (a value more where words are odd), then `noise_words` of noise. Keys and the
  value of each key are drawn with replacement.
* Each pair but the last is replaced by two words of noise with probability `noise`. One of them, drawn, never is, so
  that something is said.
* The last pair repeats a key, uniform among those said. (MAD lets the pair that is spared be the last one, which was
  never in danger, and fails on a row of nothing but noise.)

The last value stands in the row too, so that rows have a round length; MAD cuts it off.

`targets`: "asked", or "all": every next token, as MAD trains. First values, keys and noise are not to be known, so such
a loss has a floor far above 0, and a model spends itself on them.

To answer, a model finds the key's last place and says what came next. Chance: 1 / values. Plateau: a value of an
earlier pair, drawn; its key is the one asked for somewhat more often than 1 / keys. Settings and figures: mad.py.
"""

import dataclasses
from typing import Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Rows, Task, by_question, empty, in_blocks, whole
from training.data import DataError

Targets = Literal["asked", "all"]

_KEYS, _VALUES, _SPARED, _NOISY, _NOISE, _LAST = range(6)  # streams of draws
_UNIT = 1 << 30  # probabilities are whole numbers of it


@dataclasses.dataclass(frozen=True)
class InContext(Task):
    """vocab (noise_words included), length, noise, targets: the law, as above."""

    vocab: int = 16
    length: int = 128
    noise: float = 0.0
    noise_words: int = 0
    targets: Targets = "asked"

    def __post_init__(self):
        one_of(self)
        whole(self, length=4, noise_words=0)
        if self.length % 2:
            raise DataError(f"InContext.length is {self.length}: it must be even, a pair is two tokens")
        if self.keys < 1:
            raise DataError(f"InContext.vocab is {self.vocab}: it must be at least noise_words + 2")
        if not 0 <= self.noise < 1:
            raise DataError(f"InContext.noise is {self.noise}: it must be at least 0 and below 1")
        if self.noise and not self.noise_words:
            raise DataError("InContext.noise_words is 0: noise needs at least 1")

    @property
    def keys(self) -> int:
        return (self.vocab - self.noise_words) // 2

    @property
    def values(self) -> int:
        return self.vocab - self.noise_words - self.keys

    @property
    def asked(self) -> int:
        return self.length - 1 if self.targets == "all" else self.length // 2 - 1

    @property
    def chance(self) -> float:
        if self.targets == "asked":
            return 1 / self.values
        # Each pair is of two keys' or values' tokens in both rows, or of noise in both, or never the same.
        S = self.length // 2 - 1
        pair = (1 - self.noise) + self.noise / S
        noise = (1 - pair) ** 2 / self.noise_words if self.noise_words else 0.0
        keys, values = pair**2 / self.keys + noise, pair**2 / self.values + noise
        # The first key is not asked for; the last pair is never noise.
        return (S * values + (S - 1) * keys + 1 / self.keys + 1 / self.values) / (2 * S + 1)

    @property
    def plateau(self) -> float | None:
        if self.targets == "all":
            return None
        S, keep, other = self.length // 2 - 1, 1 - self.noise, 1 - 1 / self.keys
        miss = 1 - keep / self.keys  # a pair other than the spared one leaves a key unsaid
        asked = same = 0.0  # questions, and how often an earlier pair, drawn, has their key, expected in a row
        for s in range(S):
            # The spared pair stands before, here or later.
            for share, here, some, unsaid in (
                (s / S, keep, 1.0, other * miss ** max(s - 1, 0)),
                (1 / S, 1.0, 1 - self.noise**s, miss**s),
                ((S - 1 - s) / S, keep, 1 - self.noise**s, miss**s),
            ):
                asked += share * here * (1 - unsaid)
                same += share * here * some / self.keys
        # The last key is uniform among those said: a pair has it with probability 1 / (number of those).
        said_K = np.zeros([self.keys + 1])
        said_K[1] = 1
        again_K = np.arange(self.keys + 1) / self.keys
        for _ in range(S - 1):
            new_K = keep * said_K * (1 - again_K)
            said_K = said_K - new_K
            said_K[1:] += new_K[:-1]
        same += float(np.sum(said_K[1:] / np.arange(1, self.keys + 1)))
        right = same / (asked + 1)
        return right + (1 - right) / self.values

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, S = len(index_N), self.length // 2 - 1
        ids_NT, labels_NT = empty(N, self.length)
        key_NS = draws.integers(seed, _KEYS, index_N, S, self.keys)
        value_NS = draws.integers(seed, _VALUES, index_N, S, self.values)
        real_NS = np.ones([N, S], bool)
        if self.noise:
            spared_N = draws.integers(seed, _SPARED, index_N, 1, S)
            real_NS = draws.integers(seed, _NOISY, index_N, S, _UNIT) >= round(self.noise * _UNIT)
            np.put_along_axis(real_NS, spared_N, True, 1)
            key_NS[~real_NS] = self.keys  # a key that stands for noise, until it is written
        first_NS, before_NS = sayings(key_NS)
        new_NS = real_NS & (before_NS < 0)
        nth_NS = np.cumsum(new_NS, 1, dtype=np.int64)  # how many keys were said till here
        which_N = draws.integers(seed, _LAST, index_N, 1, nth_NS[:, -1:])
        last_N = (nth_NS > which_N).argmax(1)[:, None]  # where the last pair's key was said first
        last_key_N = np.take_along_axis(key_NS, last_N, 1)
        value_NS = np.take_along_axis(value_NS, first_NS, 1)
        ids_NT[:, : 2 * S : 2], ids_NT[:, 1 : 2 * S : 2] = key_NS, self.keys + value_NS
        ids_NT[:, -2:-1] = last_key_N
        ids_NT[:, -1:] = self.keys + np.take_along_axis(value_NS, last_N, 1)
        if self.noise:
            noise_NT = self.vocab - self.noise_words + draws.integers(seed, _NOISE, index_N, 2 * S, self.noise_words)
            np.copyto(ids_NT[:, : 2 * S], noise_NT, where=np.repeat(~real_NS, 2, axis=1), casting="same_kind")
        if self.targets == "all":
            labels_NT[:, :-1] = ids_NT[:, 1:]
            return Rows(ids_NT, labels_NT, {})
        asked = np.ones([N, S + 1], bool)
        asked[:, :-1] = real_NS & (before_NS >= 0)
        np.copyto(labels_NT[:, ::2], ids_NT[:, 1::2], where=asked)
        pair = np.concatenate([np.take_along_axis(nth_NS, first_NS, 1) - 1, which_N], 1)
        latest = S - 1 - (key_NS == last_key_N)[:, ::-1].argmax(1)[:, None]
        distance = 2 * (np.arange(S + 1) - np.concatenate([before_NS, latest], 1))
        return Rows(ids_NT, labels_NT, by_question(asked, self.asked, pair=pair, distance=distance))


def sayings(code_NS: Ints) -> tuple[Ints, Ints]:
    """Of each code: where its row says it first; and where last, before here (-1: never). int64 [N, S] each."""
    S = code_NS.shape[1]
    low = (1 << S.bit_length()) - 1
    key = code_NS * (low + 1) + np.arange(S)  # sorted by code, then by place
    key.sort(axis=1)
    place = key & low
    head = np.ones(key.shape, bool)
    np.not_equal(key[:, 1:] - place[:, 1:], key[:, :-1] - place[:, :-1], out=head[:, 1:])
    start = np.maximum.accumulate(np.where(head, np.arange(S), 0), axis=1)
    previous = np.full_like(place, -1)
    np.copyto(previous[:, 1:], place[:, :-1], where=~head[:, 1:])
    first_NS, before_NS = np.empty_like(place), np.empty_like(place)
    np.put_along_axis(first_NS, place, np.take_along_axis(place, start, 1), 1)
    np.put_along_axis(before_NS, place, previous, 1)
    return first_NS, before_NS
