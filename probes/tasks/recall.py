"""Multi-query associative recall (MQAR), by the law of Zoology (Arora et al. 2023, arXiv 2312.04927).

A row says `pairs` key-value pairs, then asks for each value once, by its key:

    k0 v0 k1 v1 ... | . . k1 . . . k0 . ...      the answer to a key is the label at that key's place

* Keys are different draws from 1..W/2-1 and values different draws from W/2..W-1, W = `vocab`.
* After the 2·pairs tokens of context come slots of two tokens. One after another, the queries draw a slot without
  replacement, slot g with weight (g+1)^(exponent-1): near ones are likelier, as with repeated bigrams in text.
* A query sits in the first token of its slot. The answer is never in the row after it, so one row asks all its
  questions independently. Whatever is neither context nor query is filler.

No column is lost to the next-token shift. Zoology makes length+1 columns, the last always empty, and cuts inputs at
the end and labels at the start; here inputs and labels are made `length` wide at once, with the same result.

`filler`: "random", any token (Zoology's code; a key may recur before its query, with what looks like another value
behind it: 2% of the queries at 256 words, 64 tokens and 4 pairs); "zero", token 0 (the 2023 paper's figure);
"conflict_free", any token that is not a key of the row, so that no pair is ever said twice and 100% is attainable.

`order`: "drawn" gives the i-th drawn slot to the i-th pair, as Zoology does. Early draws take near slots, so pairs are
asked roughly in the order they were said: the correlation of pair and slot is 0.10 to 0.54 in the published settings.
"shuffled" deals the drawn slots to the pairs at random.

Chance: 2/vocab for a random value, 1/pairs for a model that answers with some value of the context (a plateau that
attention sits on for a while).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

Filler = Literal["random", "zero", "conflict_free"]
Order = Literal["drawn", "shuffled"]
Int32s = npt.NDArray[np.int32]

_KEYS, _VALUES, _SLOTS, _FILLER, _DEAL = range(5)  # streams of draws
_BLOCK = 1 << 16  # tokens made at a time, so that temporaries stay in cache


def batch(
    vocab: int,
    length: int,
    pairs: int,
    rows: int,
    seed: int,
    random_filler: bool = True,
    *,
    filler: Filler | None = None,
    order: Order = "drawn",
    exponent: float = 0.01,
    start: int = 0,
) -> tuple[Int32s, Int32s]:
    """Rows start..start+rows-1 of the data of `seed`: inputs and labels, int32 [rows, length].

    Labels are NOT_ASKED but for `pairs` places a row. `filler` is "random" or "zero" by `random_filler` unless given.
    Row i depends on (seed, i) and the law only, never on the batch it is in. DataError for an impossible law.
    """
    filler = filler or ("random" if random_filler else "zero")
    check(vocab, length, pairs, filler, order)
    return rows_at(np.arange(start, start + rows), vocab, length, pairs, seed, filler, order, exponent)


def rows_at(
    index_N: npt.NDArray[np.int64],
    vocab: int,
    length: int,
    pairs: int,
    seed: int,
    filler: Filler = "random",
    order: Order = "drawn",
    exponent: float = 0.01,
) -> tuple[Int32s, Int32s]:
    """As `batch`, for any rows: inputs and labels, int32 [N, length]. The law is not checked here."""
    rows, context = len(index_N), 2 * pairs
    inputs_NL = np.zeros([rows, length], np.int32)
    labels_NL = np.full([rows, length], NOT_ASKED, np.int32)
    # Rounded, so that the last bit of a machine's power function is not in the law.
    weights = np.round(np.arange(1, (length - context) // 2 + 1) ** (exponent - 1) * 2.0**40)
    block = max(1, _BLOCK // length)
    for low in range(0, rows, block):
        some_N = index_N[low : low + block]
        inputs, labels = inputs_NL[low : low + block], labels_NL[low : low + block]
        keys = 1 + draws.distinct(seed, _KEYS, some_N, pairs, vocab // 2 - 1)
        values = vocab // 2 + draws.distinct(seed, _VALUES, some_N, pairs, vocab - vocab // 2)
        slots = draws.weighted_order(seed, _SLOTS, some_N, weights, pairs)
        if order == "shuffled":
            deal = np.argsort(draws.bits(seed, _DEAL, some_N, pairs), axis=1, kind="stable")
            slots = np.take_along_axis(slots, deal, 1)
        if filler == "random":
            inputs[:] = draws.integers(seed, _FILLER, some_N, length, vocab)
        elif filler == "conflict_free":
            inputs[:] = _avoiding(np.sort(keys, 1), draws.integers(seed, _FILLER, some_N, length, vocab - pairs), vocab)
        inputs[:, 0:context:2] = keys
        inputs[:, 1:context:2] = values
        np.put_along_axis(inputs, context + 2 * slots, keys.astype(np.int32), 1)
        np.put_along_axis(labels, context + 2 * slots, values.astype(np.int32), 1)
    return inputs_NL, labels_NL


def _avoiding(keys_NP: npt.NDArray[np.int64], draw_NL: npt.NDArray[np.int64], vocab: int) -> npt.NDArray[np.int64]:
    """The draw_NL-th word (from 0) of those that are not among the row's sorted keys."""
    # Word d + j is that word when j keys are below it: keys i with keys[i] - i <= d. One search serves all rows, each
    # in a range of numbers of its own.
    rows, pairs = keys_NP.shape
    row_N = np.arange(rows)[:, None] * vocab
    below = np.searchsorted((row_N + keys_NP - np.arange(pairs)).ravel(), (row_N + draw_NL).ravel(), side="right")
    return draw_NL + below.reshape(draw_NL.shape) - np.arange(rows)[:, None] * pairs


def check(vocab: int, length: int, pairs: int, filler: str = "random", order: str = "drawn") -> None:
    """Raises DataError unless such rows exist."""
    if pairs < 1:
        raise DataError(f"recall: pairs is {pairs}: it must be at least 1")
    if length % 2:
        raise DataError(f"recall: length is {length}: it must be even, a query's slot is two tokens wide")
    if length < 4 * pairs:
        raise DataError(f"recall: length is {length}: {pairs} pairs and their queries need at least {4 * pairs}")
    if vocab <= length:
        raise DataError(f"recall: vocab is {vocab}: it must be above the length, {length}")
    for name, value, known in (("filler", filler, get_args(Filler)), ("order", order, get_args(Order))):
        if value not in known:
            raise DataError(f"recall: {name} is {value!r}: it must be one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of one length and one number of pairs."""

    length: int
    pairs: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Recall(DataConfig):
    """MQAR as data to train on: B rows a step, all of one segment.

    train: an epoch visits every row of every segment once, in batches of one segment (the last of a segment filled up
        with its first rows), the batches of all segments in random order. The rows come from the run's seed.
    test: rows never trained on; the same for every run.
    T: length of a training row, at least that of the longest segment (0: just that); shorter ones are padded.
    exponent: of the slots' power law.
    """

    T: int = 0
    B: int = 256
    vocab: int = 8192
    train: tuple[Segment, ...] = (Segment(64, 4, 100_000),)
    test: tuple[Segment, ...] = (Segment(64, 4, 3_000),)
    filler: Filler = "random"
    order: Order = "drawn"
    exponent: float = 0.01

    def __post_init__(self):
        for name in ("train", "test"):
            if not getattr(self, name):
                raise DataError(f"Recall.{name} is empty: give it at least one Segment")
        for segment in self.train + self.test:
            check(self.vocab, segment.length, segment.pairs, self.filler, self.order)
            if segment.rows < 1:
                raise DataError(f"Segment.rows is {segment.rows}: it must be at least 1")
        longest = max(segment.length for segment in self.train)
        if 0 < self.T < longest:
            raise DataError(f"Recall.T is {self.T}: the longest training segment needs {longest} (0 means just that)")
        object.__setattr__(self, "T", self.T or longest)
        super().__post_init__()

    def build(self) -> "RecallDataset":
        return RecallDataset(self)

    def rows(self, segment: Segment, seed: int, index_N: npt.NDArray[np.int64], T: int) -> Batch:
        """The given rows of a segment, padded to [N, T]."""
        law = (self.vocab, segment.length, segment.pairs, seed, self.filler, self.order, self.exponent)
        inputs, labels = rows_at(index_N, *law)
        place = np.broadcast_to(np.arange(segment.length, dtype=np.int32), inputs.shape)
        pad = [(0, 0), (0, T - segment.length)]
        return Batch(
            np.pad(inputs, pad), np.pad(place, pad, constant_values=-1), np.pad(labels, pad, constant_values=NOT_ASKED)
        )


class RecallDataset(Dataset):
    """Batches of a Recall config. `labelled` is the most questions that a row of any segment asks."""

    config: Recall

    def __init__(self, config: Recall):
        self.config = config
        self.words = config.vocab
        self.labelled = max(segment.pairs for segment in config.train + config.test)
        self.token_bytes = np.zeros([config.vocab], np.int32)
        self.digest = hashlib.sha256(f"recall 1: {config}".encode()).hexdigest()
        self._batches = tuple(-(-segment.rows // config.B) for segment in config.train)  # of each segment in an epoch

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        config = self.config
        epoch, step = divmod(step, sum(self._batches))
        which, nth = (int(x[step]) for x in _schedule(seed, epoch, self._batches))
        segment = config.train[which]
        order = _row_order(seed, epoch, which, segment.rows)
        index_B = np.take(order, np.arange(nth * config.B, (nth + 1) * config.B)[rows or slice(None)], mode="wrap")
        return config.rows(segment, draws.fold(_TRAIN, which, seed), index_B, config.T)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """Batches of one segment each, the segments by turns, all padded to the longest; so `batches` cuts them evenly.

        The last batch of a segment is filled up with rows of padding.
        """
        T = max(segment.length for segment in self.config.test)
        tests = [self.questions(segment, rows, T) for segment in self.config.test]
        count = 0
        while tests:
            for test in tuple(tests):
                if count == batches:
                    return
                batch = next(test, None)
                if batch is None:
                    tests.remove(test)
                else:
                    count += 1
                    yield batch

    def questions(self, segment: Segment, rows: slice | None = None, T: int | None = None) -> Iterator[Batch]:
        """The test rows of a segment (of the test set or any other), in batches as long as its rows, or T."""
        config, T = self.config, T or segment.length
        check(config.vocab, segment.length, segment.pairs)
        seed = draws.fold(_TEST, segment.length, segment.pairs)
        for first in range(0, segment.rows, config.B):
            index_B = np.arange(first, first + config.B)[rows or slice(None)]
            batch = config.rows(segment, seed, index_B, T)
            beyond_B1 = (index_B >= segment.rows)[:, None]
            yield Batch(
                np.where(beyond_B1, np.int32(0), batch.ids_BT),
                np.where(beyond_B1, np.int32(-1), batch.pos_BT),
                np.where(beyond_B1, np.int32(NOT_ASKED), batch.labels_BT),
            )

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.array(text.split(), np.int32)

    def decode(self, ids: npt.NDArray[np.int32]) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))


_TRAIN, _TEST, _ORDER, _SCHEDULE = range(4)  # seeds are kept apart by what they are for


@functools.lru_cache(16)
def _row_order(seed: int, epoch: int, which: int, rows: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch visits the rows of a segment."""
    return draws.permutation(draws.fold(_ORDER, seed, epoch), which, rows)


@functools.lru_cache(16)
def _schedule(seed: int, epoch: int, batches: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """By step of an epoch: which segment, and which of its batches."""
    which = np.repeat(np.arange(len(batches)), batches)
    nth = np.concatenate([np.arange(count) for count in batches])
    order = draws.permutation(draws.fold(_SCHEDULE, seed, epoch), 0, len(which))
    return which[order], nth[order]


# Figure 2 of Zoology (ICLR 2024): one setting at a time, two layers of width 64 to 512 without MLPs, 64 epochs at
# learning rates 1e-4, 4.6e-4, 2.2e-3 and 1e-2, the best of them shown.
ZOOLOGY_FIGURE2 = tuple(
    Recall(
        B=B,
        vocab=8192,
        train=(Segment(length, pairs, 100_000),),
        test=(Segment(length, pairs, 3_000),),
        filler="zero",
    )
    for length, pairs, B in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
)

# Figure 2 of Based (Arora et al. 2024, arXiv 2402.18668): one mixture, tested on rows up to four times longer with up
# to four times the pairs; 32 epochs of 707 steps at learning rates 1e-3, 3.2e-3, 1e-2 and 3.2e-2, stopped at 99%.
BASED_FIGURE2 = Recall(
    B=256,
    vocab=8192,
    train=(
        Segment(64, 4, 100_000),
        Segment(128, 8, 20_000),
        Segment(256, 16, 20_000),
        Segment(256, 32, 20_000),
        Segment(256, 64, 20_000),
    ),
    test=(
        Segment(64, 4, 1_000),
        Segment(64, 8, 1_000),
        Segment(64, 16, 1_000),
        Segment(128, 32, 1_000),
        Segment(256, 64, 1_000),
        Segment(512, 128, 1_000),
        Segment(1024, 256, 1_000),
    ),
    filler="random",
)
