"""What a task is: a law from which rows come by (seed, index) alone; and data made of laws, to train on and to ask.

Task    the law of one kind of rows, one file each in this folder
Probe   data: laws to train on and laws to be asked, in batches
Trial   a probe with what a small model needs to learn it; each file has some by name, found by `discover`
"""

import dataclasses
import functools
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from probes.tasks import draws
from training.data import NOT_ASKED, Batch, DataConfig, DataError, Dataset

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """N rows of a law.

    ids_NT, labels_NT: int32. A label is what is to be said at its place, NOT_ASKED where nothing is.
    about: facts of each question, int64 [N, Q]: Q the most labels of a row, in the order of their places, -1 beyond
        the row's own. The names that reports know:
            answer       which of the row's answers a label is part of; one of several tokens is right if all are
            pair         which of the row's facts is asked for, in the order in which they were said
            slot         which of the places for questions is used
            distance     tokens from the (last) evidence to the question
            depth        where the (first) evidence stands, in tokens from the row's start
            distractors  what else in the row looks like the evidence
            since        how much was written after the evidence, in blocks or updates, as the task counts
            older        values that were told before the one asked for and count no more
            legal        a bit for each word that may be said (words below 63), where not the label alone is right
        What is the same for all questions of a law is left out, and what follows from another of these alone.
    length_N: tokens of each row, where they differ; what is beyond is padding.
    """

    ids_NT: Int32s
    labels_NT: Int32s
    about: dict[str, Ints]
    length_N: Ints | None = None


class Task:
    """The law of one kind of rows, a frozen dataclass: its fields are the law, checked in `__post_init__` (DataError).

    `rows` depends on (seed, index) and the fields alone: never on the batch, the machine or the Python
    (probes/tasks/draws.py). What all rows of a law share besides, such as a map to be learnt by heart, is drawn from a
    field.

    version: of the rows; another number whenever the same (seed, index) gives other tokens, labels or lengths.
    vocab: words. length: tokens of the longest row. asked: labels of a row, at most.
    chance: share right of a model that knows the law but not the row: it answers as another row would.
    plateau: share right of one that answers with something of the right kind that the row says; None where that is no
        guess of its own. Of answers of several tokens, which stand in the row as far as they were asked, `keyless`:
        that is high, and the share of whole answers is what counts.
    region: tokens at a row's start that may be read ahead (JRT); 0 for none.
    bottleneck: all is to be said from what the model knows at the row's end (probes/bottleneck.py).
    """

    version: ClassVar[int] = 1

    @property
    def vocab(self) -> int:
        raise NotImplementedError

    @property
    def length(self) -> int:
        raise NotImplementedError

    @property
    def asked(self) -> int:
        raise NotImplementedError

    @property
    def chance(self) -> float:
        raise NotImplementedError

    @property
    def plateau(self) -> float | None:
        return None

    @property
    def region(self) -> int:
        return 0

    @property
    def bottleneck(self) -> bool:
        return False

    def rows(self, seed: int, index_N: Ints) -> Rows:
        raise NotImplementedError

    def harder(self) -> "Task | None":
        """The same law with more to remember, in rows of the same length; None where there is none."""
        return None

    @property
    def says(self) -> dict[str, Any]:
        """What reports know the law by; those of a trial are told from each other by what differs."""
        fields = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        first = [name for name in fields if name == "length"]
        return {name: getattr(self, name) for name in first + [name for name in fields if name != "length"]}

    @functools.cached_property
    def name(self) -> str:
        """The law in words, with its version: what a row of results must say for its numbers to mean anything."""
        return f"{self} v{self.version}"

    def test_seed(self) -> int:
        """Of the rows that nothing is trained on: the same for a law in whatever probe it is asked."""
        return draws.fold(_TEST, int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:7]))

    def batch(self, seed: int, index_N: Ints, T: int, beyond: int | None = None) -> Batch:
        """Rows as a model reads them, padded to T tokens. Those from index `beyond` on are padding whole."""
        real_N = None if beyond is None else index_N < beyond
        return self.padded(self.rows(seed, index_N), T, real_N)

    def padded(self, rows: Rows, T: int, real_N: npt.NDArray[np.bool_] | None = None) -> Batch:
        """Rows of this law as a model reads them, padded to T tokens. real_N: the others are padding whole."""
        length_N = np.full([len(rows.ids_NT)], rows.ids_NT.shape[1]) if rows.length_N is None else rows.length_N
        if real_N is not None:
            length_N = np.where(real_N, length_N, 0)
        place_T = np.arange(T, dtype=np.int32)
        real_NT = place_T < length_N[:, None]
        pad = [(0, 0), (0, T - rows.ids_NT.shape[1])]
        return Batch(
            np.where(real_NT, np.pad(rows.ids_NT, pad), np.int32(0)),
            np.where(real_NT, place_T, np.int32(-1)),
            np.where(real_NT, np.pad(rows.labels_NT, pad, constant_values=NOT_ASKED), np.int32(NOT_ASKED)),
            real_NT & (place_T < self.region) if self.region else None,
        )


def empty(N: int, T: int) -> tuple[Int32s, Int32s]:
    """Rows of token 0 that ask nothing: ids and labels, int32 [N, T]."""
    return np.zeros([N, T], np.int32), np.full([N, T], NOT_ASKED, np.int32)


def in_blocks(make: Callable[[Ints], Rows], index_N: Ints, T: int) -> Rows:
    """make(index_N), some rows of T tokens at a time, so that what it holds on the way stays in cache."""
    block = max(1, (1 << 16) // T)
    if len(index_N) <= block:
        return make(index_N)
    made = [make(index_N[low : low + block]) for low in range(0, len(index_N), block)]
    return Rows(
        np.concatenate([rows.ids_NT for rows in made]),
        np.concatenate([rows.labels_NT for rows in made]),
        {name: np.concatenate([rows.about[name] for rows in made]) for name in made[0].about},
        None if made[0].length_N is None else np.concatenate([rows.length_N for rows in made]),
    )


def by_question(asked_NS: npt.NDArray[np.bool_], Q: int, **values_NS: Ints) -> dict[str, Ints]:
    """What is known of each place that asks, in the order of the places: Rows.about, [N, Q] of each name."""
    own_NQ = np.arange(Q) < asked_NS.sum(1)[:, None]
    about = {}
    for name, values in values_NS.items():
        about[name] = np.full(own_NQ.shape, -1, np.int64)
        about[name][own_NQ] = values[asked_NS]
    return about


@functools.lru_cache(256)
def keyless(facts: int, tokens: int, words: int) -> float:
    """Share right of the best completion without a key, where a fact is `tokens` uniform ones of `words`.

    An answer's tokens so far stand before the next one, so it can be guessed without the question: as most of the row's
    facts go on that agree with them (before the first token, all do). Measured, on facts that are always the same; what
    was asked for before in a row is not made use of.
    """
    rows = max(16, (1 << 16) // facts)
    fact_RT = draws.integers(_KEYLESS, 0, np.arange(rows), facts * tokens, words).reshape(rows * facts, tokens)
    alike_R, right = np.repeat(np.arange(rows), facts), 0  # a number for each row, and what was said of the fact
    for t in range(tokens):
        longer, alike_R, count = np.unique(alike_R * words + fact_RT[:, t], return_inverse=True, return_counts=True)
        shorter = longer // words
        right += np.maximum.reduceat(count, np.flatnonzero(np.diff(shorter, prepend=-1))).sum()
    return float(right / fact_RT.size)


def whole(task: Any, **least: int) -> None:
    """Raises DataError, naming the field, unless each of the named fields is at least so much. For `__post_init__`."""
    for field, low in least.items():
        value = getattr(task, field)
        if value < low:
            raise DataError(f"{type(task).__name__}.{field} is {value}: it must be at least {low}")


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a law: the first so many, or ever new ones (0; for training only)."""

    task: Task
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Probe(DataConfig):
    """Tasks as data: B rows a step, all of one part. All laws share a vocabulary.

    train: parts with a number of rows are visited whole in each epoch, in batches of one part (the last of a part
        filled up with its first rows), the batches of all parts in random order. Parts without one take turns, and no
        row comes twice. The rows come from the run's seed.
    test: rows of another seed, the same for every run. Where a law has few different rows, some are trained on too.
    T: length of a training row, at least that of the longest law (0: just that); shorter rows are padded.
    """

    T: int = 0
    B: int = 256
    train: tuple[Part, ...] = ()
    test: tuple[Part, ...] = ()

    def __post_init__(self):
        for name in ("train", "test"):
            if not getattr(self, name):
                raise DataError(f"Probe.{name} is empty: give it at least one Part")
        if len({part.rows > 0 for part in self.train}) > 1:
            raise DataError("Probe.train has parts with and without a number of rows: give all of them one, or none")
        if any(part.rows < 1 for part in self.test) or any(part.rows < 0 for part in self.train):
            raise DataError("Part.rows is below 1: give the number of rows that are asked")
        words = {part.task.vocab for part in self.train + self.test}
        if len(words) > 1:
            raise DataError(f"Probe has laws of {' and '.join(map(str, sorted(words)))} words: give all the same vocab")
        if len({part.task.region > 0 for part in self.train + self.test}) > 1:
            raise DataError("Probe has laws with a region that is read ahead, and laws without: give one kind")
        longest = max(part.task.length for part in self.train)
        if 0 < self.T < longest:
            raise DataError(f"Probe.T is {self.T}: the longest training row needs {longest} (0 means just that)")
        object.__setattr__(self, "T", self.T or longest)
        super().__post_init__()

    def build(self) -> "ProbeData":
        return ProbeData(self)


def probe(train: Sequence[Task], tests: Sequence[Task], rows: int, B: int = 64) -> Probe:
    """Trained on ever new rows of some laws, by turns; asked so many rows of each of some."""
    return Probe(B=B, train=tuple(Part(law) for law in train), test=tuple(Part(law, rows) for law in tests))


class ProbeData(Dataset):
    """Batches of a Probe. `labelled` is the most labels of any law's row."""

    config: Probe

    def __init__(self, config: Probe):
        self.config = config
        every = [part.task for part in config.train + config.test]
        self.words = every[0].vocab
        self.labelled = max(task.asked for task in every)
        self.prefix = max(task.region for task in every)
        self.token_bytes = np.zeros([self.words], np.int32)
        said = [(part.task.name, part.rows) for part in config.train + config.test]
        self.digest = hashlib.sha256(f"probe 1: {config.T} {config.B} {len(config.train)} {said}".encode()).hexdigest()
        self._batches = tuple(-(-part.rows // config.B) for part in config.train)  # of each part in an epoch

    def batch(self, seed: int, step: int, rows: slice | None = None) -> Batch:
        config = self.config
        if config.train[0].rows:
            epoch, step = divmod(step, sum(self._batches))
            which, nth = (int(x[step]) for x in _schedule(seed, epoch, self._batches))
            order = _row_order(seed, epoch, which, config.train[which].rows)
            index_B = np.take(order, np.arange(nth * config.B, (nth + 1) * config.B), mode="wrap")
        else:
            which = step % len(config.train)
            index_B = step * config.B + np.arange(config.B)
        law_seed = draws.fold(_TRAIN, which, seed)
        return config.train[which].task.batch(law_seed, index_B[rows or slice(None)], config.T)

    def held_out(self, batches: int | None = None, rows: slice | None = None) -> Iterator[Batch]:
        """Batches of one part each, the parts by turns, all padded to the longest; so `batches` cuts them evenly.

        The last batch of a part is filled up with rows of padding.
        """
        T = max(part.task.length for part in self.config.test)
        tests = [self.questions(part, rows, T) for part in self.config.test]
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

    def questions(self, part: Part, rows: slice | None = None, T: int | None = None) -> Iterator[Batch]:
        """The test rows of a part (of the test set or any other), in batches as long as its rows, or T."""
        seed = part.task.test_seed()
        for first in range(0, part.rows, self.config.B):
            index_B = np.arange(first, first + self.config.B)[rows or slice(None)]
            yield part.task.batch(seed, index_B, T or part.task.length, beyond=part.rows)

    def encode(self, text: str) -> Int32s:
        return np.array(text.split(), np.int32)

    def decode(self, ids: Int32s) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))


_TRAIN, _TEST, _ORDER, _SCHEDULE, _KEYLESS = range(5)  # seeds are kept apart by what they are for


@functools.lru_cache(16)
def _row_order(seed: int, epoch: int, which: int, rows: int) -> Ints:
    """The order in which an epoch visits the rows of a part."""
    return draws.permutation(draws.fold(_ORDER, seed, epoch), which, rows)


@functools.lru_cache(16)
def _schedule(seed: int, epoch: int, batches: tuple[int, ...]) -> tuple[Ints, Ints]:
    """By step of an epoch: which part, and which of its batches."""
    which = np.repeat(np.arange(len(batches)), batches)
    nth = np.concatenate([np.arange(count) for count in batches])
    order = draws.permutation(draws.fold(_SCHEDULE, seed, epoch), 0, len(which))
    return which[order], nth[order]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A probe, and what a small model needs to learn it on two cores in some minutes.

    data: what it is trained on and asked. steps, lr: of training. D: width of the model. blocks: how often it has the
    layer under test. conv: a gated short convolution stands before each (Zoology's architecture), which a layer without
    one of its own needs to see two tokens at once. mlp: an MLP stands behind each. goal: of the accuracy, at which the
    steps to it are counted. about: what is asked, in a line; the first sentence of the task's file if empty.
    watched: the law that the steps to the goal are counted on; None for the last trained.
    """

    data: Probe
    steps: int = 400
    lr: float = 1e-2
    D: int = 64
    blocks: int = 1
    conv: bool = True
    mlp: bool = False
    goal: float = 0.99
    about: str = ""
    watched: Task | None = dataclasses.field(default=None, repr=False)  # a config's hash has its name

    @property
    def goal_law(self) -> Task:
        """The law that the steps to the goal are counted on."""
        return self.watched or self.data.train[-1].task


def discover() -> dict[str, Trial]:
    """The trials of all files of this folder by name; a new file is found without being listed.

    A file's `trials` has the laptop's size of a task as NAME, and others as NAME@SIZE: "paper" as published, "large",
    "smoke" for a look.
    """
    found: dict[str, Trial] = {}
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        mine = getattr(importlib.import_module(f"{package}.{module.name}"), "trials", {})
        if twice := found.keys() & mine.keys():
            raise ValueError(f"probes/tasks/{module.name}.py has a trial {min(twice)!r}, which another file has too")
        found |= mine
    return dict(sorted(found.items()))
