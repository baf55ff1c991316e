"""Delayed recall: what was said is asked for after a delay, so that a memory's hold on it can be read off over delays.

    recall     s . . . . . . . . GO          the label at GO: s, the cue that was said first (a T-maze)
    copy       s1 s2 s3 . . . . . GO . .     the labels from GO on: s1 s2 s3 (the copying memory problem)
    repeat     s1 s2 s3 s4 s5 s6 s7 ...      the label at each place from `delay` on: what stands `delay` back

Symbols are uniform ones of `symbols`. After the cue come `delay` tokens: blanks, or, for `noise` above 0, uniform ones
of so many words that are no symbols. "copy" cues with `items` symbols, which all are asked for, in their order: while
they are, the row is blank (the answers are not read, as in the classic). "repeat" asks `items` places of a row of delay
+ items symbols; only the delay is the law's, and the model must keep that many symbols at any time.

To answer, "recall" takes a memory that keeps one symbol over everything that follows; "copy" one that keeps an order
too, and a count of the answers given; "repeat" a queue of `delay` symbols. Asked over delays, accuracy falls to the
middle between 1 and chance at a memory's half-life.

Chance: 1 / symbols. Plateau, of "copy": some symbol of the cue, 1/items + (1 - 1/items) / symbols. The classic copies
10 of 8 symbols. The delays, 32 to 16,384 at @large, are ours and follow no paper.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

Kind = Literal["recall", "copy", "repeat"]

_SYMBOLS, _NOISE = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Delayed(Task):
    """kind, delay, items, noise: the law, as above. symbols: how many there are.

    Tokens are the blank, symbols, GO and noise in this order.
    """

    kind: Kind = "recall"
    delay: int = 32
    items: int = 1
    symbols: int = 8
    noise: int = 0

    def __post_init__(self):
        one_of(self)
        whole(self, delay=1, items=1, symbols=2, noise=0)
        if self.kind == "recall" and self.items > 1:
            raise DataError(f"Delayed.items is {self.items}: recall has one cue; copy has as many as you like")
        if self.kind == "repeat" and self.noise:
            raise DataError(f"Delayed.noise is {self.noise}: repeat has nothing but symbols, so it must be 0")

    @property
    def vocab(self) -> int:
        return 2 + self.symbols + self.noise

    @property
    def length(self) -> int:
        return self.delay + self.items + (0 if self.kind == "repeat" else self.items)

    @property
    def asked(self) -> int:
        return self.items

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def plateau(self) -> float | None:
        return 1 / self.items + (1 - 1 / self.items) / self.symbols if self.kind == "copy" and self.items > 1 else None

    @property
    def says(self) -> dict[str, Any]:
        if self.kind != "repeat":
            return super().says
        return {"length": self.length, "delay": self.delay, "symbols": self.symbols}

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, items, delay = len(index_N), self.items, self.delay
        ids, labels = empty(N, self.length)
        count = self.length if self.kind == "repeat" else items
        ids[:, :count] = 1 + draws.integers(seed, _SYMBOLS, index_N, count, self.symbols)
        labels[:, -items:] = ids[:, :items]
        if self.kind != "repeat":
            if self.noise:
                noise = draws.integers(seed, _NOISE, index_N, delay, self.noise)
                ids[:, items : items + delay] = 2 + self.symbols + noise
            ids[:, items + delay] = 1 + self.symbols
        item = np.broadcast_to(np.arange(items), [N, items])
        about = {"depth": item} if items > 1 else {}
        if self.kind == "copy":
            about["answer"] = np.zeros_like(item)
        return Rows(ids, labels, about)


def _probe(
    kind: Kind, train: tuple[int, ...], tests: tuple[int, ...], rows: int, items: int, noise: int = 0, B: int = 64
) -> Probe:
    learnt, asked = ([Delayed(kind, delay, items, noise=noise) for delay in delays] for delays in (train, tests))
    return probe(learnt, asked, rows, B)


def _repeat(delay: int, items: int, tests: tuple[int, ...], rows: int) -> Probe:
    return probe([Delayed("repeat", delay, items)], [Delayed("repeat", delay, count) for count in tests], rows)


_LARGE = tuple(2**power for power in range(5, 15))
trials = {
    "delayed": Trial(_probe("recall", (16, 32, 64), (16, 32, 64, 128, 256, 512, 1024), 256, 1, noise=8), blocks=2),
    "delayed@smoke": Trial(_probe("recall", (16,), (16, 32), 64, 1, noise=8), steps=100),
    "delayed@large": Trial(_probe("recall", (32, 256, 1024), _LARGE, 256, 1, noise=8), 10_000, 1e-3, D=128, blocks=2),
    "copy_memory": Trial(
        _probe("copy", (16, 32, 64), (16, 32, 64, 128, 256, 512, 1024), 256, 10, B=32), 1_500, blocks=2
    ),
    "copy_memory@smoke": Trial(_probe("copy", (16,), (16, 32), 64, 6), steps=100, blocks=2),
    "copy_memory@large": Trial(_probe("copy", (32, 256, 1024), _LARGE, 256, 10), 20_000, 1e-3, D=128, blocks=2),
    # Nothing in a row of "repeat" says its delay: each is learnt by itself, and asked in longer rows. No convolution is
    # in front, and the delay is beyond what those of the layers themselves (3 tokens back in each) reach together.
    "repeat_previous": Trial(_repeat(16, 48, (48, 112, 240), 256), steps=900, blocks=2, conv=False),
    "repeat_previous@smoke": Trial(_repeat(4, 28, (28,), 64), steps=100, conv=False),
    "repeat_previous@far": Trial(_repeat(64, 64, (64, 192, 448), 256), steps=4_000, blocks=2, conv=False),
}
_ABOUT = {
    "delayed": "A cue is asked for after a delay of noise, also delays longer than any of training.",
    "copy_memory": "Symbols are said again after a delay of blanks (the copying memory problem).",
    "repeat_previous": "At each place, the symbol that stands a fixed number of places back.",
}
trials = {name: dataclasses.replace(trial, about=_ABOUT[name.partition("@")[0]]) for name, trial in trials.items()}
