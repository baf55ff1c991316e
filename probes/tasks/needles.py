"""Needles in a haystack, after RULER (Hsieh et al. 2024, arXiv 2404.06654), of tokens instead of sentences.

    w w w NEEDLE k IS d d d w w w w ... w w NEEDLE k IS d d d w w w ASK k d d ...      the labels: d d d

A row is a haystack of words with `keys` · `values` needles in it, and questions at its end. A needle says one value, of
`symbols` digits, of one key; a key has `values` of them. A question names a key and asks for all its values in the
order in which the row said them: the first digit at the key, each next one at the digit before it, which the row holds.
Keys are different names, digits are uniform. The first `queries` keys are asked; which needles those are is chance.

* Each needle has one of `depths` equally spaced places between the start (0) and the end (100%) of the haystack, no two
  the same one.
* `filler`: "repeat", words 0..period-1 again and again (RULER's noise); "markov", a text by a chain of order 2 with
  `branches` successors, one for all rows, drawn from `chain` (for RULER's essays); "needles", needles of other keys,
  which may recur (what fills no needle is words 0, 1, ... at the start).
* Words, names and digits are different tokens, so a needle is seen at once: what is tested is whether it is kept, and
  whether it is found by its key.

`depth` is where a needle starts; `distance` counts from there to its question, where there are several; `pair` is which
of several needles it is (not among needles alone, where the depth says it).

To answer, a model must keep what a needle says over everything behind it. With one needle and a haystack that repeats,
a memory that writes what it does not expect suffices; with several it must be found by its key; among nothing but
needles all of them must be kept.

Chance: 1 / digits, a label. Plateau: what completion without the key gives (`keyless`, probes/tasks/task.py), 0.75 of
four needles of three digits: from the second digit on, those before it tell which needle it is, so a model that has
found out what values are, and not how a key leads to its own, goes on as they do. A number is known when it is whole:
the share of whole answers (`exact`) is the headline, and the first digit is what the plateau leaves open.

RULER's S-NIAH-1 (passkey), -2 (number) and -3 (uuid) are niah_single, niah_markov and niah_uuid; MK-1, MK-2, MV and MQ
are niah_multikey, niah_multikey2, niah_multivalue and niah_multiquery. Its samples are 500 a task, its score the share
of values said. Of text, trained on 4,096 tokens, 1.3B parameters (Gated DeltaNet, arXiv 2412.06464, Table 2), percent:

                     S1 1k   2k   4k   8k     S2 1k   2k   4k   8k     S3 1k   2k   4k
    DeltaNet          97.4 96.8 99.0 98.8      98.4 45.6 18.6 14.4      85.2 47.0 22.4
    Mamba-2           99.2 98.8 65.4 30.4      99.4 98.8 56.2 17.0      64.4 47.6  4.6
    Gated DeltaNet    98.4 88.4 91.4 91.8     100.0 99.8 92.2 29.6      86.6 84.2 27.6

Titans (arXiv 2501.00663, Table 2) at 16k, S1, S2, S3: TTT 88.4 4.4 0, Mamba-2 5.4 0 0, DeltaNet 71.4 5.4 0, Titans LMM
96.2 80.2 80.6, MAC 98.4 97.4 95.2, MAG 97.4 98.6 88.2, MAL 97.4 96.4 90.4.

passkey is one fixed key and a number of five digits in a haystack that repeats; by length and depth.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Int32s, Ints, Probe, Rows, Task, Trial, empty, in_blocks, keyless, probe, whole
from training.data import DataError

_KEYS, _VALUES, _DEPTHS, _FILLER, _OTHERS = range(5)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Needles(Task):
    """length, filler, keys, values, queries, symbols, depths, period, branches, chain: the law, as above.

    words, names, digits: how many there are of each. Tokens are words, names, digits, NEEDLE, IS and ASK in this order.
    """

    length: int = 256
    filler: Literal["repeat", "markov", "needles"] = "markov"
    keys: int = 1
    values: int = 1
    queries: int = 1
    symbols: int = 3
    depths: int = 40
    words: int = 256
    names: int = 256
    digits: int = 16
    period: int = 32
    branches: int = 4
    chain: int = 0

    def __post_init__(self):
        one_of(self)
        whole(self, keys=1, values=1, queries=1, symbols=1, depths=2, words=2, names=1, digits=2, period=1, branches=1)
        if self.queries > self.keys:
            raise DataError(f"Needles.queries is {self.queries}: it must be at most keys, {self.keys}")
        if self.keys > self.names - (self.filler == "needles"):
            most = "names" if self.filler != "needles" else "names - 1, as the haystack has other keys"
            raise DataError(f"Needles.keys is {self.keys}: it must be at most {most}, of {self.names} names")
        if self.needles > self.depths:
            raise DataError(f"Needles.depths is {self.depths}: {self.needles} needles need as many")
        if max(self.period, self.branches) > self.words:
            raise DataError(f"Needles.words is {self.words}: it must be at least period and branches")
        if self.room < 1:
            least = self.length - self.room + 1
            raise DataError(f"Needles.length is {self.length}: its needles and questions need at least {least}")

    @property
    def needles(self) -> int:
        return self.keys * self.values

    @property
    def needle(self) -> int:
        """Tokens of a needle."""
        return 3 + self.symbols

    @property
    def question(self) -> int:
        """Tokens of a question with its answer."""
        return 2 + self.values * self.symbols

    @property
    def body(self) -> int:
        """Tokens before the questions. The last token of the last answer is only said, never read."""
        return self.length - self.queries * self.question + 1

    @property
    def room(self) -> int:
        """Tokens of the haystack."""
        return self.body - self.needles * self.needle

    @property
    def facts(self) -> int:
        """Needles of a row, those that are its haystack too."""
        return self.needles + (self.room // self.needle if self.filler == "needles" else 0)

    @property
    def vocab(self) -> int:
        return self.words + self.names + self.digits + 3

    @property
    def asked(self) -> int:
        return self.queries * self.values * self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.digits

    @property
    def plateau(self) -> float | None:
        return keyless(self.facts, self.symbols, self.digits) if self.facts > 1 else None

    def rows(self, seed: int, index_N: Ints) -> Rows:
        # At least 64 rows in a block, however long: a chain takes a step of all rows at once.
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, min(self.length, 1024))

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, n, size, body = len(index_N), self.needles, self.needle, self.body
        IS, ASK = self.vocab - 2, self.vocab - 1
        names = draws.distinct(seed, _KEYS, index_N, self.keys, self.names)
        digits = draws.integers(seed, _VALUES, index_N, n * self.symbols, self.digits) + self.words + self.names
        depths = draws.distinct(seed, _DEPTHS, index_N, n, self.depths)
        # Needles are numbered as they are said. Key j's have the draw's depths j·values .. (j+1)·values - 1.
        key = np.argsort(depths, axis=1) // self.values
        depths.sort(axis=1)
        unit = size if self.filler == "needles" else 1
        start = depths * (self.room // unit) // (self.depths - 1) * unit + self.room % unit + np.arange(n) * size
        needles = np.empty([N, n, size], np.int64)
        needles[:, :, 0] = IS - 1
        needles[:, :, 1] = self.words + np.take_along_axis(names, key, 1)
        needles[:, :, 2] = IS
        needles[:, :, 3:] = digits.reshape(N, n, self.symbols)

        ids, labels = empty(N, self.length)
        lay(ids[:, :body], self._haystack(seed, index_N, names), start, needles)

        asked = np.argsort(key, axis=1, kind="stable")[
            :, : self.queries * self.values
        ]  # needles, by key, as they are said
        answers = np.take_along_axis(needles[:, :, 3:], asked[:, :, None], 1)
        questions = np.empty([N, self.queries, self.question], np.int64)
        questions[:, :, 0] = ASK
        questions[:, :, 1] = self.words + names[:, : self.queries]
        questions[:, :, 2:] = answers.reshape(N, self.queries, -1)
        ids[:, body:] = questions.reshape(N, -1)[:, :-1]
        said = np.full(questions.shape, labels[0, 0] if N else 0)
        said[:, :, 1:-1] = questions[:, :, 2:]
        labels[:, body:] = said.reshape(N, -1)[:, :-1]

        depth = np.take_along_axis(start, asked, 1)
        ask = body + np.arange(self.queries * self.values) // self.values * self.question
        about = {"answer": np.broadcast_to(np.arange(asked.shape[1]), asked.shape), "depth": depth}
        if n > 1 and self.filler != "needles":
            about["pair"] = asked
        if self.queries > 1:
            about["distance"] = ask - depth
        return Rows(ids, labels, {name: np.repeat(fact, self.symbols, 1) for name, fact in about.items()})

    def _haystack(self, seed: int, index_N: Ints, names: Ints) -> Ints:
        N, room = len(index_N), self.room
        if self.filler == "markov":
            return draws.markov(seed, _FILLER, index_N, room, self.words, self.branches, self.chain)
        if self.filler == "repeat":
            return np.broadcast_to(np.arange(room) % self.period, (N, room))
        units, rest = divmod(room, self.needle)
        name = draws.others(names, draws.integers(seed, _OTHERS, index_N, units, self.names - self.keys))
        digits = draws.integers(seed, _FILLER, index_N, units * self.symbols, self.digits)
        hay = np.empty([N, rest + units * self.needle], np.int64)
        hay[:, :rest] = np.arange(rest) % self.words
        needles = hay[:, rest:].reshape(N, units, self.needle)
        needles[:, :, 0], needles[:, :, 2] = self.vocab - 3, self.vocab - 2
        needles[:, :, 1] = self.words + name
        needles[:, :, 3:] = self.words + self.names + digits.reshape(N, units, -1)
        hay[:, rest:] = needles.reshape(N, -1)
        return hay


def lay(ids_NT: Int32s, hay_NR: Ints, start_NS: Ints, needles_NSK: Ints) -> None:
    """Writes needles into ids, each from its start on, and the haystack, in its order, around them."""
    N, S, K = needles_NSK.shape
    place = (start_NS[:, :, None] + np.arange(K)).reshape(N, -1)
    free = np.ones(ids_NT.shape, bool)
    np.put_along_axis(free, place, False, 1)
    ids_NT[free] = hay_NR.ravel()
    np.put_along_axis(ids_NT, place, needles_NSK.reshape(N, -1).astype(np.int32), 1)


def _probe(train: tuple[int, ...], tests: tuple[int, ...], rows: int, B: int = 64, **law: Any) -> Probe:
    """Trained on rows of some lengths, and asked others of the same law."""
    learnt, asked = ([Needles(length=length, **law) for length in lengths] for lengths in (train, tests))
    return probe(learnt, asked, rows, B)


_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "niah_single": ("A number said once in a text that repeats (RULER's S-NIAH-1).", {"filler": "repeat"}),
    "niah_markov": ("A number said once in a text by a chain (S-NIAH-2).", {}),
    "niah_uuid": ("Eight digits said once in a text by a chain (S-NIAH-3).", {"symbols": 8}),
    "niah_multikey": ("One of four keys' numbers in a text by a chain (MK-NIAH-1).", {"keys": 4}),
    "niah_multikey2": ("One key's number among nothing but others' (MK-NIAH-2).", {"filler": "needles"}),
    "niah_multivalue": ("All four numbers of a key, in the order in which they were said (MV-NIAH).", {"values": 4}),
    "niah_multiquery": ("Four keys' numbers, one after another (MQ-NIAH).", {"keys": 4, "queries": 4}),
    "passkey": (
        "A number of five digits in a text that repeats; there is one key.",
        {"filler": "repeat", "names": 1, "symbols": 5, "digits": 10},
    ),
}
_LAPTOP = {"words": 64, "names": 64}
_STEPS = {"niah_multikey": 1_500, "niah_multikey2": 2_500, "niah_multivalue": 1_500, "niah_multiquery": 1_500}
_SMALL = {"words": 32, "names": 32, "period": 8}
trials = {}
for _name, (_about, _law) in _FAMILY.items():
    trials[_name] = Trial(
        _probe((64,), (64, 128, 256, 512, 1024), 128, **{**_LAPTOP, **_law}),
        steps=_STEPS.get(_name, 1_000),
        lr=3e-3,
        blocks=2,
        about=_about,
    )
    trials[f"{_name}@smoke"] = Trial(
        _probe((96,), (96, 192), 64, 32, **{**_SMALL, **_law}), steps=100, blocks=2, about=_about
    )
    trials[f"{_name}@large"] = Trial(
        _probe((1024,), (1024, 2048, 4096, 8192, 16384), 500, **_law),
        steps=10_000,
        lr=1e-3,
        D=128,
        blocks=2,
        about=_about,
    )
