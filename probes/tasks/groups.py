"""State tracking: word problems of finite groups. What is the product of all elements read so far?

    x0   x1      x2           ...        labels x0, x0·x1, x0·x1·x2, ...

A token is an element, drawn uniformly; the product runs from left to right, and each is a token too. The groups:

    Zk      the sum modulo k (any k from 2): Z2 is parity
    Sn, An  permutations of n things (n from 3 to 6), all or the even ones; a·b does b first and then a
    GxH     pairs, each part by itself: A4xZ5

Element 0 is the one that changes nothing. Z60, A4xZ5 and A5 have 60 elements each and differ in how they are built: A5
is not made of commutative groups, and a product in it is as hard as any that constant memory can keep (Barrington
1989). Merrill, Petty and Sabharwal (2024, arXiv 2404.08819) compare the three; rows of 2 to 20 elements, asked at every
place.

`labels`: "every" place, so that a row asks for all shorter ones too; or the "last" alone. `shortest`: the least
elements of a row, where the number is drawn (uniformly, to `length`); 0 for rows of just `length`.

To answer, a model keeps one element and multiplies on; what it does at the first tokens must go on for as long as the
row does. A linear memory with eigenvalues in (0, 1) cannot even for Z2, past the lengths it was trained on; with
(-1, 1) it can (Grazzi et al. 2024, arXiv 2411.12537, whose rows for parity are of 3 to 40 tokens in training and 40 to
256 in the test, the answer at the last). Chance: 1 / elements; a product that lacks one factor is uniform. Plateau, of
"every" place: the token itself, which is the answer at the first place and right by chance at the others.
"""

import dataclasses
import functools
import itertools
import re
from typing import Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, empty, in_blocks, whole
from training.data import DataError

_ELEMENTS, _LENGTH = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Groups(Task):
    """group, labels, shortest: the law, as above. length: elements of the longest row."""

    group: str = "Z2"
    length: int = 40
    labels: Literal["every", "last"] = "every"
    shortest: int = 0

    def __post_init__(self):
        one_of(self)
        whole(self, length=1, shortest=0)
        if not all(map(_factor, self.group.split("x"))):
            raise DataError(f"Groups.group is {self.group!r}: it must be Zk, S3 to S6, A3 to A6 or a product, as A4xZ5")
        if self.shortest > self.length:
            raise DataError(f"Groups.shortest is {self.shortest}: it must be at most length, {self.length}")

    @property
    def vocab(self) -> int:
        return len(table(self.group))

    @property
    def asked(self) -> int:
        return self.length if self.labels == "every" else 1

    @property
    def chance(self) -> float:
        return 1 / self.vocab

    @property
    def plateau(self) -> float | None:
        if self.labels == "last":
            return None
        lengths = range(self.shortest or self.length, self.length + 1)
        return sum((1 + (T - 1) / self.vocab) / T for T in lengths) / len(lengths)

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, T, n = len(index_N), self.length, self.vocab
        ids_NT, labels_NT = empty(N, T)
        ids_NT[:] = draws.integers(seed, _ELEMENTS, index_N, T, n)
        times = table(self.group).ravel()
        products_TN = ids_NT.T.copy(order="C")
        for t in range(1, T):
            products_TN[t] = times[products_TN[t - 1] * n + products_TN[t]]
        length_N = None
        end_N = np.full([N, 1], T)
        if self.shortest:
            end_N = self.shortest + draws.integers(seed, _LENGTH, index_N, 1, T + 1 - self.shortest)
            length_N = end_N[:, 0]
        if self.labels == "last":
            last_N = end_N - 1
            np.put_along_axis(labels_NT, last_N, np.take_along_axis(products_TN.T, last_N, 1), 1)
            return Rows(ids_NT, labels_NT, {"slot": last_N} if self.shortest else {}, length_N)
        slot_NT = np.where(np.arange(T) < end_N, np.arange(T), -1)
        np.copyto(labels_NT, products_TN.T, where=slot_NT >= 0)
        return Rows(ids_NT, labels_NT, {"slot": slot_NT}, length_N)


def _factor(name: str) -> bool:
    return bool(re.fullmatch(r"Z([2-9]|[1-9]\d{1,3})|[SA][3-6]", name))


@functools.lru_cache(16)
def table(group: str) -> np.ndarray:
    """a · b of all elements: int32 [elements, elements]."""
    first, _, rest = group.partition("x")
    if rest:
        one, two = table(first), table(rest)
        # Element a · |H| + b is (a, b).
        n = len(one) * len(two)
        return (one[:, None, :, None] * len(two) + two[None, :, None, :]).reshape(n, n).astype(np.int32)
    n = int(first[1:])
    if first[0] == "Z":
        return np.add.outer(np.arange(n), np.arange(n)).astype(np.int32) % np.int32(n)
    members = np.array(list(itertools.permutations(range(n))))
    if first[0] == "A":
        inversions = sum(members[:, i] > members[:, j] for i in range(n) for j in range(i + 1, n))
        members = members[inversions % 2 == 0]
    digits = n ** np.arange(n)  # a permutation as a number
    number_of = {number: element for element, number in enumerate((members @ digits).tolist())}
    products = members[:, members] @ digits  # members[a][members[b]], all at once
    return np.array([[number_of[number] for number in row] for row in products.tolist()], np.int32)


def _trials(name: str, group: str, length: int, steps: int) -> dict[str, Trial]:
    """Trained on rows of `length`, asked to eight times it, at every place. Nothing but the layer mixes tokens."""
    law = Groups(group, length)
    tests = tuple(Part(dataclasses.replace(law, length=length * k), 512 // k) for k in (1, 2, 4, 8))
    small = dataclasses.replace(law, length=16 if length > 20 else 8)
    twice = dataclasses.replace(small, length=2 * small.length)
    smoke = Probe(B=64, train=(Part(small),), test=(Part(small, 128), Part(twice, 64)))
    return {
        name: Trial(
            Probe(B=64, train=(Part(law),), test=tests), steps, 3e-3, conv=False, mlp=True, about=_about(group)
        ),
        f"{name}@smoke": Trial(smoke, 200, 3e-3, conv=False, mlp=True, about=_about(group)),
    }


def _about(group: str) -> str:
    if group[0] == "Z":
        return f"State tracking: the sum modulo {group[1:]} of all tokens so far."
    return f"State tracking: the product of all elements so far, in {group}."


def _paper(train: Groups, *tests: Groups, rows: int) -> Trial:
    data = Probe(B=256, train=(Part(train),), test=tuple(Part(test, rows) for test in tests))
    return Trial(data, steps=20_000, lr=1e-3, D=128, blocks=2, conv=False, about=_about(train.group))


_PARITY = Groups("Z2", 40, "last", 3)
_WORDS = {"z60": "Z60", "a4xz5": "A4xZ5", "a5": "A5", "s5": "S5"}

trials = {
    **_trials("parity", "Z2", 40, 600),
    **_trials("mod5", "Z5", 40, 1_500),
    **_trials("s3", "S3", 40, 1_500),
    **{k: trial for name, group in _WORDS.items() for k, trial in _trials(name, group, 20, 3_000).items()},
    "parity@paper": _paper(_PARITY, _PARITY, dataclasses.replace(_PARITY, length=256, shortest=40), rows=8_192),
} | {
    # The rows are published; width, depth and steps are those of parity.
    f"{name}@paper": _paper(Groups(group, 20), *(Groups(group, k) for k in (2, 5, 10, 15, 20)), rows=1_000)
    for name, group in _WORDS.items()
}
