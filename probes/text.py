"""Recall asked of a trained language model, in text of its own kind, at lengths far beyond those it was trained on.

A row is a document of so many tokens: held-out text with what is to be remembered somewhere in it, a question, and the
answer, which the model is scored on as it reads (teacher forcing): the share of tokens that it would have said, whether
it would have said them all, and their nats. Rows are read in pieces with the state carried on, so that a bounded memory
takes the same room at any length.

    passkey     # The pass key is 48213. ...            # What is the pass key? The pass key is 48213
    needle      four NAME = 7 digits, one asked         assert NAME == 4930272
    phonebook   a line of First Last: 7 digits each     one of them again
    copying     random letters throughout               12 of them again: which 12 came next?
    order       the text alone                          two of its passages: which came first, A or B? (chance 1/2)
    read_twice  a passage                               the same again, every token asked
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from layers.layer import Tokens
from models.lm import LanguageModel
from models.loss import score
from probes.tasks import draws
from training.data import NOT_ASKED, DataError, Dataset
from training.summary import state_bytes

VERSION = 1
DEPTHS = 8
_NUMBER, _NAME, _PLACE, _LETTERS, _HAY = range(5)  # streams of draws
FIRST = (
    "Ada Alan Barbara Claude Donald Edsger Frances Grace Hedy Ivan John Katherine Leslie Margaret Niklaus Radia"
).split()
LAST = (
    "Allen Backus Church Dahl Engelbart Floyd Gray Hopper Iverson Knuth Lamport Milner Naur Perlman Ritchie Wirth"
).split()
NOUNS = (
    "ANCHOR BASIN CANDLE DELTA EMBER FALCON GARNET HARBOR ISLAND JUNIPER KETTLE LANTERN MEADOW NICKEL ORCHID PEBBLE"
).split()


@dataclasses.dataclass(frozen=True)
class Row:
    """One question: what is planted in the text and where (a share of it), how it is asked, and the answer.

    before, answer: token ids of the whole prompt, and of what is to be said. depth: 0 to DEPTHS - 1.
    other: another answer, where the likelier of two counts (order).
    """

    before: list[int]
    answer: list[int]
    depth: int
    other: list[int] | None = None


class Source:
    """Held-out text of a dataset as one stream of tokens, without document starts."""

    def __init__(self, dataset: Dataset):
        tokens = np.concatenate([batch.ids_BT[batch.pos_BT >= 0] for batch in dataset.held_out()])
        self.dataset, self.start = dataset, [] if dataset.doc_start is None else [dataset.doc_start]
        self.tokens = tokens if dataset.doc_start is None else tokens[tokens != dataset.doc_start]

    def encode(self, text: str) -> list[int]:
        return self.dataset.encode(text).tolist()

    def hay(self, seed: int, index: int, count: int) -> list[int]:
        """`count` consecutive tokens from a place of the row's own; text that is too short begins anew."""
        first = _draw(seed, _HAY, index, 1, len(self.tokens))[0]
        return np.take(self.tokens, np.arange(first, first + count), mode="wrap").tolist()


def _draw(seed: int, stream: int, index: int, count: int, below: int) -> list[int]:
    return draws.integers(seed, stream, np.array([index]), count, below)[0].tolist()


def _distinct(seed: int, stream: int, index: int, count: int, below: int) -> list[int]:
    return draws.distinct(seed, stream, np.array([index]), count, below)[0].tolist()


def _digits(seed: int, index: int, count: int, numbers: int = 1) -> list[str]:
    drawn = _draw(seed, _NUMBER, index, count * numbers, 10)
    return ["".join(map(str, drawn[i * count : (i + 1) * count])) for i in range(numbers)]


def _planted(
    source: Source, seed: int, index: int, T: int, needles: list[str], question: str, answer: str, asked: int = 0
) -> Row:
    """A row of T tokens: needles in the text, the one that is asked for at the row's own depth, others anywhere."""
    said, ask, reply = [source.encode(needle) for needle in needles], source.encode(question), source.encode(answer)
    room = T - len(source.start) - sum(map(len, said)) - len(ask) - len(reply)
    if room < 0:
        raise DataError(f"a row of {T} tokens is too short for this question: it needs {T - room}")
    hay = source.hay(seed, index, room)
    depth = index % DEPTHS
    places = _draw(seed, _PLACE, index, len(said), room + 1)
    places[asked] = round((depth + 0.5) / DEPTHS * room)
    row, done = list(source.start), 0
    for place, needle in sorted(zip(places, said, strict=True), key=lambda pair: pair[0]):
        row += hay[done:place] + needle
        done = place
    return Row(row + hay[done:] + ask, reply, depth)


def passkey(source: Source, seed: int, index: int, T: int) -> Row:
    (key,) = _digits(seed, index, 5)
    needle = f"\n# The pass key is {key}. Remember it. {key} is the pass key.\n"
    return _planted(source, seed, index, T, [needle], "\n# What is the pass key? The pass key is ", key)


def needle(source: Source, seed: int, index: int, T: int) -> Row:
    names = [NOUNS[n] for n in _distinct(seed, _NAME, index, 4, len(NOUNS))]
    values = _digits(seed, index, 7, 4)
    said = [f"\n{name} = {value}\n" for name, value in zip(names, values, strict=True)]
    return _planted(source, seed, index, T, said, f"\nassert {names[0]} == ", values[0])


def phonebook(source: Source, seed: int, index: int, T: int) -> Row:
    line = len(source.encode("Katherine Engelbart: 0000000\n"))
    most = min((T - 2 * line) // line, len(FIRST) * len(LAST))
    if most < 1:
        raise DataError(f"a row of {T} tokens is too short for a line of a phone book: it needs {3 * line}")
    people = _distinct(seed, _NAME, index, most, len(FIRST) * len(LAST))
    names = [f"{FIRST[p % len(FIRST)]} {LAST[p // len(FIRST)]}" for p in people]
    numbers = _digits(seed, index, 7, most)
    depth = index % DEPTHS
    asked = min(most - 1, int((depth + 0.5) / DEPTHS * most))
    book = [f"{name}: {number}\n" for name, number in zip(names, numbers, strict=True)]
    before = source.start + source.encode("".join(book) + f"\n{names[asked]}: ")
    return Row(before, source.encode(numbers[asked]), depth)


def copying(source: Source, seed: int, index: int, T: int) -> Row:
    shown, said = 12, 12
    count = T - len(source.start) - 1 - shown - said
    if count < 4 * (shown + said):
        raise DataError(f"a row of {T} tokens is too short to copy from: it needs {T - count + 4 * (shown + said)}")
    letters = "".join("abcdefghijklmnopqrstuvwxyz"[n] for n in _draw(seed, _LETTERS, index, count, 26))
    depth = index % DEPTHS
    at = min(count - shown - said, int((depth + 0.5) / DEPTHS * count))
    before = source.start + source.encode(letters + "\n" + letters[at : at + shown])
    return Row(before, source.encode(letters[at + shown : at + shown + said]), depth)


def order(source: Source, seed: int, index: int, T: int) -> Row:
    segment = 20
    ask = (
        source.encode("\n# Passage A: "),
        source.encode("\n# Passage B: "),
        source.encode("\n# The first was passage "),
    )
    room = T - len(source.start) - sum(map(len, ask)) - 2 * segment - 1
    if room < 4 * segment:
        raise DataError(f"a row of {T} tokens is too short for two passages: it needs {T - room + 4 * segment}")
    hay = source.hay(seed, index, room)
    depth, swap = index % DEPTHS, index // DEPTHS % 2  # as many As as Bs: a model that likes a letter gains nothing
    early = int(depth / DEPTHS * (room - 2 * segment))
    late = early + segment + _draw(seed, _PLACE, index, 1, room - early - 2 * segment + 1)[0]
    one, two = hay[early : early + segment], hay[late : late + segment]
    a, b = (two, one) if swap else (one, two)
    before = source.start + hay + ask[0] + a + ask[1] + b + ask[2]
    letters = source.encode("B"), source.encode("A")
    return Row(before, letters[1 - swap], depth, letters[swap])


def read_twice(source: Source, seed: int, index: int, T: int) -> Row:
    passage = source.hay(seed, index, (T - len(source.start)) // 2)
    return Row(source.start + passage, passage, 0)


FORMS: dict[str, Callable[[Source, int, int, int], Row]] = {
    "passkey": passkey,
    "needle": needle,
    "phonebook": phonebook,
    "copying": copying,
    "order": order,
    "read_twice": read_twice,
}


class Reader:
    """A model that reads rows piece by piece with its state carried on, and says how likely each label was."""

    def __init__(self, model: LanguageModel, piece: int = 256):
        self.model, self.piece = jax.jit(LanguageModel.unstacked)(model), piece
        self._empty = jax.jit(lambda model, B, T: model.init_state(B, T), static_argnums=(1, 2))
        self._read = jax.jit(self._piece, donate_argnums=1)
        self._temporary: dict[str, int] = {}

    @staticmethod
    def _piece(model: LanguageModel, state: Any, tokens: Tokens, labels_BT: Array) -> tuple[Any, Array, Array]:
        out = model.hidden(tokens, state)
        scores = score(model, out.y_BTD, labels_BT)
        return out.state, scores.nll, scores.best

    def temporary(self, B: int, T: int) -> int:
        """Bytes that reading a piece takes besides the weights and the state, by XLA's own account."""
        room = -(-T // self.piece) * self.piece
        state = jax.eval_shape(lambda model: model.init_state(B, room), self.model)
        shapes = str(jax.tree.leaves(state))
        if shapes not in self._temporary:
            ids = jax.ShapeDtypeStruct((B, self.piece), jnp.int32)
            tokens: Any = Tokens(ids, ids)  # type: ignore[arg-type]
            analysis: Any = self._read.lower(self.model, state, tokens, ids).compile().memory_analysis()
            self._temporary[shapes] = int(analysis.temp_size_in_bytes)
        return self._temporary[shapes]

    def __call__(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt, answer) of each row -> nats and right, [B, A], and which of the A tokens are its own.

        Rows end together: what a shorter one has too few stands before it as padding, which no memory sees.
        """
        B, A = len(rows), max(len(answer) for _, answer in rows)
        longest = max(len(before) + len(answer) for before, answer in rows) - 1
        T = -(-longest // self.piece) * self.piece
        ids = np.zeros([B, T], np.int32)
        pos, labels = np.full([B, T], -1, np.int32), np.full([B, T], NOT_ASKED, np.int32)
        for b, (before, answer) in enumerate(rows):
            said = before + answer
            ids[b, T - len(said) + 1 :] = said[:-1]
            pos[b, T - len(said) + 1 :] = np.arange(len(said) - 1)
            labels[b, T - len(answer) :] = answer
        state = self._empty(self.model, B, T)
        nats, best = [], []
        for first in range(0, T, self.piece):
            some = slice(first, first + self.piece)
            tokens = Tokens(jnp.asarray(ids[:, some]), jnp.asarray(pos[:, some]))
            state, nll_BT, best_BT = self._read(self.model, state, tokens, jnp.asarray(labels[:, some]))
            if (labels[:, some] != NOT_ASKED).any():
                nats.append(np.asarray(nll_BT))
                best.append(np.asarray(best_BT))
        last = labels[:, T - A :]
        own = last != NOT_ASKED
        return np.concatenate(nats, 1)[:, -A:], (np.concatenate(best, 1)[:, -A:] == last) & own, own


def ask(
    reader: Reader,
    source: Source,
    form: str,
    length: int,
    *,
    rows: int,
    batch: int,
    twice: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """A row of results: a form of question asked `rows` times in documents of `length` tokens.

    twice: each prompt is read twice before the answer (JRT-prompt, arXiv 2407.05483).
    Raises DataError where so short a document cannot hold the question.
    """
    start = time.perf_counter()
    found: list[tuple[float, bool, float, int]] = []  # share right, whole, nats, depth
    firsts: list[tuple[float, float]] = []
    for some in (range(first, min(first + batch, rows)) for first in range(0, rows, batch)):
        made = [FORMS[form](source, draws.fold(VERSION, seed), index, length) for index in some]
        if twice:
            made = [dataclasses.replace(row, before=row.before + row.before[len(source.start) :]) for row in made]
        nll, right, own = reader([(row.before, row.answer) for row in made])
        count = own.sum(1)
        if made[0].other is not None:  # the likelier of two
            other, _, _ = reader([(row.before, row.other or []) for row in made])
            right = (nll.sum(1) < other.sum(1))[:, None] & own
        if form == "read_twice":  # what the first reading knew of the same tokens
            first, hit, _ = reader([(source.start or row.answer[:1], row.answer) for row in made])
            firsts += list(zip(first.sum(1) / count, hit.sum(1) / count, strict=True))
        depths = [row.depth for row in made]
        found += list(zip(right.sum(1) / count, right.sum(1) == count, nll.sum(1) / count, depths, strict=True))
    shares = np.array([row[0] for row in found])
    depth = np.array([row[3] for row in found])
    longest = length * (2 if twice else 1)
    return {
        "probe": form,
        "version": VERSION,
        "length": length,
        "twice": twice,
        "rows": rows,
        "rows_seed": seed,
        "accuracy": float(shares.mean()),
        "standard_error": float(shares.std(ddof=1) / math.sqrt(rows)) if rows > 1 else None,
        "exact": float(np.mean([row[1] for row in found])),
        "nats": float(np.mean([row[2] for row in found])),
        "by_depth": [float(shares[depth == k].mean()) for k in np.unique(depth)],
        "first_accuracy": float(np.mean([hit for _, hit in firsts])) if firsts else None,
        "first_nats": float(np.mean([nll for nll, _ in firsts])) if firsts else None,
        "state_bytes": state_bytes(jax.eval_shape(lambda model: model, reader.model), longest),
        "temporary_bytes": reader.temporary(min(batch, rows), longest),
        "seconds": time.perf_counter() - start,
    }
