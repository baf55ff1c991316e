"""Copying and n-gram lookup, by the laws of Jelassi et al. 2024 (arXiv 2402.01032).

    copy       $ x a b c y | x a b c y         the labels: the string from the bar on, then the end
    prefix     $ a b | x a b c y | c y         what follows an n-gram that is said before the string
    suffix     $ x a b c y | a b c y           ... or behind it
    duplicate  copy, of a string in which one n-gram stands twice

A string has low..high letters, every length as likely, uniform ones. An answer is the string, or what follows the
n-gram in it, to its end (at most `answer` letters of it, unless that is 0), and then the end, ".": the first letter is
asked for at the bar, or at the last letter of the n-gram, each next token at the letter before it. Rows differ in
length. (The paper packs several to 220 tokens, of which all but the first begin behind another.)

* The n-gram of a lookup stands once in its string, so the answer is unique; each such n-gram that enough letters follow
  is as likely. (The paper's generator only checks that some n-gram of the string is unique, and never asks the last.)
* "duplicate" has a copy of one n-gram at another place of the string, neither over the other, each pair of places as
  likely. (The paper's writes one n-gram over every occurrence of another.)

To copy, a model must keep the whole string and know where in it it is: by place, or by the n letters before, a lookup
that a duplicate defeats. The `distractors` of a label count the other places of its string at which the `ngram` letters
before it stand too.

Chance: a label of another row, 1 / letters, and the end where both end at once. No plateau.

The paper's models have 160M parameters, 12 layers of width 1,024, trained at 1e-5 with 8 rows a step. From memory, not
checked: Transformers learn to copy 300 letters from about a hundredth of the examples that Mamba needs, and some go on
from 50 letters to 1,000.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Probe, Rows, Task, Trial, empty, in_blocks, probe, whole
from training.data import DataError

_LENGTHS, _LETTERS, _WHERE = range(3)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Copying(Task):
    """kind, low, high, ngram, answer: the law, as above. letters: how many there are; $, | and . follow them."""

    kind: Literal["copy", "prefix", "suffix", "duplicate"] = "copy"
    low: int = 5
    high: int = 20
    ngram: int = 3
    answer: int = 0
    letters: int = 26

    def __post_init__(self):
        one_of(self)
        whole(self, low=1, ngram=1, answer=0, letters=2)
        if self.high < self.low:
            raise DataError(f"Copying.high is {self.high}: it must be at least low, {self.low}")
        least = {"copy": max(1, self.answer), "duplicate": max(2 * self.ngram, self.answer)}
        need = least.get(self.kind, self.ngram + max(1, self.answer))
        if self.low < need:
            raise DataError(f"Copying.low is {self.low}: n-grams and answers of {self.kind} need at least {need}")
        if self.lookup and self.letters**self.ngram < 4 * self.high:
            raise DataError(
                f"Copying.ngram is {self.ngram}: {self.high} letters hardly have one that is unique; longer"
            )
        if self.ngram > self.high:
            raise DataError(f"Copying.ngram is {self.ngram}: it must be at most high, {self.high}")
        if self.letters**self.ngram >> 40:
            raise DataError(f"Copying.ngram is {self.ngram}: letters to its power must be below 2^40")

    @property
    def lookup(self) -> bool:
        return self.kind in ("prefix", "suffix")

    @property
    def vocab(self) -> int:
        return self.letters + 3

    @property
    def before(self) -> int:
        """Tokens before the string."""
        return self.ngram + 2 if self.kind == "prefix" else 1

    @property
    def longest(self) -> int:
        """Letters of the longest answer."""
        return self.answer or self.high - self.ngram * self.lookup

    @property
    def asked(self) -> int:
        return self.longest + 1

    @property
    def length(self) -> int:
        return self.before + self.high + self.ngram * (self.kind == "suffix") + self.longest + 1

    @property
    def chance(self) -> float:
        share = np.zeros(self.longest + 1)  # of answers, by their letters
        for m in range(self.low, self.high + 1):
            if self.answer:
                share[self.answer] += 1
            elif self.lookup:
                share[1 : m - self.ngram + 1] += 1 / (m - self.ngram)
            else:
                share[m] += 1
        share /= share.sum()
        both = np.minimum.outer(np.arange(len(share)), np.arange(len(share)))
        hits = (both / self.letters + np.eye(len(share))) / (both + 1)
        return float(share @ hits @ share)

    @property
    def says(self) -> dict[str, Any]:
        letters = str(self.low) if self.low == self.high else f"{self.low} to {self.high}"
        return {"kind": self.kind, "letters": letters, "ngram": self.ngram, "answer": self.answer, "of": self.letters}

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda some_N: self._rows(seed, some_N), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, n, H = len(index_N), self.ngram, self.high
        m = self.low + draws.integers(seed, _LENGTHS, index_N, 1, H - self.low + 1)  # letters, [N, 1]
        text, others, start = self._strings(seed, index_N, m)
        count = np.minimum(m - start, self.answer or H)  # letters of the answer
        end = self.before + m
        first = end + n if self.kind == "suffix" else end  # the place of the first label

        ids, labels = empty(N, self.length)
        place_T, j_Q = np.arange(self.length), np.arange(self.asked)
        ids[:, 0] = self.letters
        ids[:, self.before : self.before + H] = text
        np.copyto(ids, np.int32(0), where=place_T >= end)
        np.put_along_axis(ids, end, np.int32(self.letters + 1), 1)
        if self.lookup:
            gram = np.take_along_axis(text, start - n + np.arange(n), 1)
            if self.kind == "prefix":
                ids[:, 1 : n + 1], ids[:, n + 1] = gram, self.letters + 1
            else:
                np.put_along_axis(ids, end + 1 + np.arange(n), gram, 1)

        own, letter = j_Q <= count, start + j_Q  # [N, Q]
        said = np.take_along_axis(text, np.minimum(letter, H - 1), 1)
        said[j_Q == count] = self.letters + 2
        labels[np.nonzero(own)[0], (first + j_Q)[own]] = said[own]
        read = j_Q < count
        ids[np.nonzero(read)[0], (first + 1 + j_Q)[read]] = said[read]
        about = {"answer": np.zeros_like(letter), "depth": self.before + letter}
        if self.lookup or self.low < self.high:
            about["distance"] = np.broadcast_to(first - self.before - start, letter.shape)
        about["distractors"] = np.where(letter < n, 0, np.take_along_axis(others, np.clip(letter - n, 0, H - n), 1))
        return Rows(ids, labels, {k: np.where(own, v, -1) for k, v in about.items()}, (first + count + 1)[:, 0])

    def _strings(self, seed: int, index_N: Ints, m: Ints) -> tuple[np.ndarray, Ints, Ints]:
        """Strings, how often the n-gram at each place stands elsewhere in its string, and where answers start."""
        n, H = self.ngram, self.high
        text = draws.integers(seed, _LETTERS, index_N, H, self.letters).astype(np.int32)
        if self.kind == "duplicate":
            # Two places a, b of M = m - 2n + 2, a < b, stand for the places a and b + n - 1 of the n-gram.
            M = m - 2 * n + 2
            pair = draws.integers(seed, _WHERE, index_N, 2, np.concatenate([M, M - 1], 1))
            pair[:, 1] += pair[:, 1] >= pair[:, 0]
            pair.sort(axis=1)
            gram = np.take_along_axis(text, pair[:, :1] + np.arange(n), 1)
            np.put_along_axis(text, pair[:, 1:] + n - 1 + np.arange(n), gram, 1)
        others = _elsewhere(text, m, n, self.letters)
        if not self.lookup:
            return text, others, np.zeros_like(m)
        may = (others == 0) & (np.arange(H - n + 1) <= m - n - max(1, self.answer))
        which = draws.integers(seed, _WHERE, index_N, 1, np.maximum(may.sum(1)[:, None], 1))
        start = np.argmax(np.cumsum(may, 1) == which + 1, axis=1)[:, None] + n
        again = np.nonzero(~may.any(1))[0]  # no n-gram is unique: another string of the same length
        if len(again):
            text[again], others[again], start[again] = self._strings(draws.fold(seed, 0), index_N[again], m[again])
        return text, others, start


def _elsewhere(text_NH: np.ndarray, m_N1: Ints, n: int, letters: int) -> Ints:
    """How often the n-gram at each place stands at other places of the first m letters: int64 [N, H - n + 1]."""
    P = text_NH.shape[1] - n + 1
    code = np.zeros([len(text_NH), P], np.int64)
    for i in range(n):
        code *= letters
        code += text_NH[:, i : i + P]
    # What reaches beyond the string is like nothing else.
    np.copyto(code, -1 - np.arange(P), where=np.arange(P) > m_N1 - n)
    order = np.argsort(code, axis=1, kind="stable")
    code = np.take_along_axis(code, order, 1)
    head = np.ones(code.shape, bool)
    np.not_equal(code[:, 1:], code[:, :-1], out=head[:, 1:])
    run = np.cumsum(head.ravel()) - 1
    others = np.empty_like(code)
    np.put_along_axis(others, order, (np.bincount(run)[run] - 1).reshape(code.shape), 1)
    return others


def _probe(
    train: tuple[int, int], tests: tuple[int, ...], rows: int, kind: Literal["copy", "prefix", "suffix"]
) -> Probe:
    """Trained on strings of some lengths, and asked such and longer ones; copies with a duplicate n-gram too."""
    law = Copying(kind, *train)
    laws = [law] + [Copying("duplicate", max(6, train[0]), train[1])] * (kind == "copy")
    laws += [Copying(kind, length, length) for length in tests]
    return probe([law], laws, rows)


_KINDS: dict[str, tuple[Literal["copy", "prefix", "suffix"], str]] = {
    "copying": ("copy", "A string of letters is said again, also strings longer than any of training."),
    "prefix_lookup": ("prefix", "What follows an n-gram in a string that is said behind it."),
    "suffix_lookup": ("suffix", "What followed an n-gram in a string that was said before it."),
}
trials = {}
for _name, (_kind, _about) in _KINDS.items():
    trials[_name] = Trial(_probe((5, 20), (40, 80, 160, 300), 256, _kind), 2_000, 3e-3, blocks=2, about=_about)
    trials[f"{_name}@smoke"] = Trial(_probe((5, 8), (16,), 64, _kind), 100, blocks=2, about=_about)
    trials[f"{_name}@paper"] = Trial(
        dataclasses.replace(_probe((5, 300), (20, 50, 100, 200, 300, 500, 1000), 96, _kind), B=8),
        steps=20_000,
        lr=1e-5,
        D=1024,
        blocks=12,
        mlp=True,
        about=_about,
    )
