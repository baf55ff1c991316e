"""Fuzzy in-context recall, one of MAD's tasks (Poli et al. 2024, arXiv 2403.17844): keys and values of several tokens.

    . . [k3] [v5 v1] [k2 k6 k1] [v4] [k3] [v5 v1] ... [k2 k6 k1] [v4]      asked: v5 v1 of the second k3; v4, last

* Words: (vocab-1)//2 of keys, the rest but one of values, and the padding `.`, vocab-1.
* A key is a motif of `shortest` to `key` different words in order, a value one of 1 to `value`: first the number of
  words, uniform, then the words. A key keeps its value within a row; [k1 k2] and [k1] are two keys.
* Pairs follow each other while there is room for the last one, which says one of them again, each as likely. What is
  left of the length is padding, in front.
* At every key said before, the value is asked for, token by token, each label where the next token is it. Where a value
  ends is not asked.

A motif is drawn word by word: exact, in microseconds. MAD writes down all motifs of its words and shuffles them for
every row, 2 ms at 16 words and 5 s at 128. In MAD the pair asked last is planted at a drawn place, which a row may end
before; here it is always said. MAD trains with keys of 1 to 3 words and asks for keys of 3; that is `shortest`.

`targets`: as in in_context.py; the padding is a next token too.

To answer, a model compares up to `key` words with all that was said and copies up to `value`. Chance: 1 / words of
values. No plateau: a row says most of those, and which came after which word is what is asked. Settings and figures:
mad.py.
"""

import dataclasses
import functools

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.in_context import Targets, sayings
from probes.tasks.task import Ints, Rows, Task, by_question, empty, in_blocks, whole
from training.data import DataError

_KEY, _VALUE, _KEY_SIZE, _VALUE_SIZE, _LAST = range(5)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Fuzzy(Task):
    """vocab, length, key, value, shortest, targets: the law, as above."""

    vocab: int = 16
    length: int = 128
    key: int = 3
    value: int = 3
    shortest: int = 1
    targets: Targets = "asked"

    def __post_init__(self):
        one_of(self)
        whole(self, key=1, value=1, shortest=1)
        if self.shortest > self.key:
            raise DataError(f"Fuzzy.shortest is {self.shortest}: it must be at most key, {self.key}")
        least = max(2 * self.key + 1, self.key + self.value + 1, 2 * self.value)
        if self.vocab < least:
            raise DataError(f"Fuzzy.vocab is {self.vocab}: motifs of different words need at least {least}")
        if self.length < 2 * (self.key + self.value):
            least = 2 * (self.key + self.value)
            raise DataError(f"Fuzzy.length is {self.length}: a pair said twice needs at least {least}")

    @property
    def keys(self) -> int:
        return (self.vocab - 1) // 2

    @property
    def values(self) -> int:
        return self.vocab - 1 - self.keys

    @property
    def asked(self) -> int:
        if self.targets == "all":
            return self.length - 1
        return (self.length - self.shortest - 1) * self.value // (self.shortest + self.value)

    @functools.cached_property
    def chance(self) -> float:
        if self.targets == "asked":
            return 1 / self.values
        # Where keys, values and padding stand has no short form: measured, on rows that are always the same.
        ours, theirs = (self.rows(seed, np.arange(1000)).labels_NT[:, :-1] for seed in (1, 2))
        return float(np.mean(ours == theirs))

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, L, K, V = len(index_N), self.length, self.key, self.value
        room = L - 2 * (K + V)  # where a pair may begin at the latest
        P = room // (self.shortest + 1) + 1
        key_NPK = draws.motifs(seed, _KEY, index_N, P, K, self.keys)
        value_NPV = draws.motifs(seed, _VALUE, index_N, P, V, self.values)
        key_size_NP = self.shortest + draws.integers(seed, _KEY_SIZE, index_N, P, K + 1 - self.shortest)
        value_size_NP = 1 + draws.integers(seed, _VALUE_SIZE, index_N, P, V)
        code_NP = np.zeros([N, P], np.int64)  # of the key: its words + 1 as digits, none where it is over
        for k in range(K):
            code_NP *= self.keys + 1
            code_NP += np.where(k < key_size_NP, key_NPK[:, :, k] + 1, 0)
        first_NP, before_NP = sayings(code_NP)
        value_size_NP = np.take_along_axis(value_size_NP, first_NP, 1)
        size_NP = key_size_NP + value_size_NP
        start_NP = np.cumsum(size_NP, 1) - size_NP
        count_N = (start_NP <= room).sum(1)[:, None]  # pairs said, before the last
        which_N = draws.integers(seed, _LAST, index_N, 1, count_N)
        # All sayings, the last one behind all pairs that were drawn; those between are not said.
        saying_NS = np.concatenate([np.broadcast_to(np.arange(P), [N, P]), which_N], 1)
        first_NS = np.take_along_axis(first_NP, saying_NS, 1)
        key_size_NS, value_size_NS = (np.take_along_axis(x, saying_NS, 1) for x in (key_size_NP, value_size_NP))
        end_N = np.take_along_axis(start_NP + size_NP, count_N - 1, 1)
        start_NS = np.concatenate([start_NP, end_N], 1)
        start_NS += L - end_N - key_size_NS[:, -1:] - value_size_NS[:, -1:]
        said_NS = np.arange(P + 1) < count_N
        said_NS[:, -1] = True
        # The latest saying of the key asked for last.
        alike_NP = (first_NP == first_NS[:, -1:]) & said_NS[:, :-1]
        latest_N = P - 1 - alike_NP[:, ::-1].argmax(1)[:, None]
        before_NS = np.concatenate([before_NP, latest_N], 1)
        asked_NS = said_NS & (before_NS >= 0)

        ids_NT, labels_NT = empty(N, L)
        ids_NT[:] = self.vocab - 1
        ids, labels, row_N = ids_NT.ravel(), labels_NT.ravel(), np.arange(N)[:, None] * L
        for k in range(K):
            here = said_NS & (k < key_size_NS)
            ids[(row_N + start_NS + k)[here]] = np.take_along_axis(key_NPK[:, :, k], saying_NS, 1)[here]
        asked_NSV = asked_NS[:, :, None] & (np.arange(V) < value_size_NS[:, :, None])
        for v in range(V):
            word_NS = self.keys + np.take_along_axis(value_NPV[:, :, v], first_NS, 1)
            at_NS = row_N + start_NS + key_size_NS + v
            here = said_NS & (v < value_size_NS)
            ids[at_NS[here]] = word_NS[here]
            labels[at_NS[asked_NSV[:, :, v]] - 1] = word_NS[asked_NSV[:, :, v]]
        if self.targets == "all":
            labels_NT[:, :-1] = ids_NT[:, 1:]
            return Rows(ids_NT, labels_NT, {})
        nth_NP = np.cumsum(before_NP < 0, 1) - 1
        facts = {
            "answer": np.cumsum(asked_NS, 1) - 1,
            "pair": np.take_along_axis(nth_NP, first_NS, 1),
            "distance": start_NS - np.take_along_axis(start_NS, before_NS, 1),
        }
        wide = {name: np.repeat(x_NS, V, axis=1) for name, x_NS in facts.items()}
        return Rows(ids_NT, labels_NT, by_question(asked_NSV.reshape(N, -1), self.asked, **wide))
