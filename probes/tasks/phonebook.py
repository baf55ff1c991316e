"""A phone book, after Jelassi et al. 2024 (arXiv 2402.01032): the number of one name of many.

    f l 1234567  f l 7654321 ...  ASK f l 7654321  ASK f l 1234567  ASK f l 1 2 3 4 5 6      the labels: its number

A row is a book of `entries` names with their numbers, then `shots` entries of it again, each behind an ASK, as examples
of what is wanted, then one more name whose number is asked for: the first digit at the name's last token, each next one
at the digit before it. A name is two of the `names` tokens, a number `number` of the `digits`. All entries shown again
and asked for are different ones, and no name is in the book twice (in the paper's generator names may recur, and then a
question has two answers). A number's first digit is any, where the paper's is 6 to 9.

To answer, a model must keep the whole book, as any name may be asked for, and must tell names by both tokens.

Chance: 1 / digits. Plateau: what completion without the name gives (`keyless`, probes/tasks/task.py), 0.82 of 16
entries: three digits of a number tell which it is, and a model may go on by those. So the share of whole numbers
(`exact`) is the headline, as in the paper.

The paper asks pretrained models for numbers of ten digits in three batches of 32 books. From memory, not checked: of 20
to 1,750 entries; a Pythia of 410M parameters does better than a Mamba of 2.8B from some tens of entries on.
"""

import dataclasses

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, keyless, probe, whole
from training.data import DataError

_NAMES, _NUMBERS, _ASKED = range(3)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Phonebook(Task):
    """entries, shots, number: the law, as above. names, digits: how many there are of each.

    Tokens are digits, names and ASK in this order.
    """

    entries: int = 16
    shots: int = 2
    number: int = 7
    names: int = 512
    digits: int = 10

    def __post_init__(self):
        whole(self, entries=1, shots=0, number=1, names=1, digits=2)
        if self.entries <= self.shots:
            raise DataError(f"Phonebook.entries is {self.entries}: it must be above shots, {self.shots}")
        if self.entries > self.names**2:
            raise DataError(f"Phonebook.names is {self.names}: {self.entries} names of two tokens need more")

    @property
    def book(self) -> int:
        """Tokens of the entries."""
        return self.entries * (2 + self.number)

    @property
    def vocab(self) -> int:
        return self.digits + self.names + 1

    @property
    def length(self) -> int:
        return self.book + (self.shots + 1) * (3 + self.number) - 1

    @property
    def asked(self) -> int:
        return self.number

    @property
    def chance(self) -> float:
        return 1 / self.digits

    @property
    def plateau(self) -> float | None:
        return keyless(self.entries, self.number, self.digits) if self.entries > 1 else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, n, size = len(index_N), self.entries, 2 + self.number
        names = draws.distinct(seed, _NAMES, index_N, n, self.names**2)
        entries = np.empty([N, n, size], np.int32)
        entries[:, :, 0], entries[:, :, 1] = self.digits + names // self.names, self.digits + names % self.names
        entries[:, :, 2:] = draws.integers(seed, _NUMBERS, index_N, n * self.number, self.digits).reshape(N, n, -1)
        asked = draws.distinct(seed, _ASKED, index_N, self.shots + 1, n)
        again = np.empty([N, self.shots + 1, 1 + size], np.int32)
        again[:, :, 0] = self.vocab - 1
        again[:, :, 1:] = np.take_along_axis(entries, asked[:, :, None], 1)

        ids, labels = empty(N, self.length)
        ids[:, : self.book] = entries.reshape(N, -1)
        ids[:, self.book :] = again.reshape(N, -1)[:, :-1]
        labels[:, -self.number :] = again[:, -1, 3:]
        about = {"answer": np.zeros_like(asked[:, -1:]), "depth": asked[:, -1:] * size}
        return Rows(ids, labels, {name: np.repeat(fact, self.number, 1) for name, fact in about.items()})


def _probe(train: tuple[int, ...], tests: tuple[int, ...], rows: int, B: int, names: int = 512) -> Probe:
    learnt, asked = ([Phonebook(n, names=names) for n in entries] for entries in (train, tests))
    return probe(learnt, asked, rows, B)


trials = {
    "phonebook": Trial(_probe((4, 8), (4, 8, 16, 32, 64), 256, 32), steps=4_000, lr=3e-3, blocks=2),
    "phonebook@smoke": Trial(_probe((4,), (4, 8), 64, 32, names=32), steps=100, blocks=2),
    "phonebook@large": Trial(
        _probe((64,), (20, 50, 100, 200, 500, 1000, 1750), 96, 32), steps=10_000, lr=1e-3, D=128, blocks=2
    ),
}
