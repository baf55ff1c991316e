"""Modular arithmetic: what is the value of an expression? Two of the tasks of Grazzi et al. (2024, arXiv 2411.12537).

    3 - 2 * 4 + 1 =              the label at the `=`, where nothing stands behind it, is 1: -4 modulo 5
    ( ( - 3 ) + ( 2 - 4 ) ) =    0: -5 modulo 5

Words: the numbers below `modulus`, then + - * = ( ), the last two with `brackets` alone. A row's tokens, `=` included,
are drawn uniformly from `shortest` to `length`, the even numbers of them without brackets.

* Without brackets: numbers and signs, each uniform; * binds first. One reads on with a sum and a product in hand.
* With brackets, an expression of n tokens is a number (n = 1), `- a` (2), `( a )` (3) or `( - a )` (4); and from 5 on
  `( x o y )`, x of 1 to n - 4 tokens, uniform, and y of the rest. The sign o is + or -, and with `times` also *. One
  must keep what stands open, as deep as it goes.

Of short expressions there are few (five of two tokens), so rows of less than 12 tokens are trained on and not asked.

Grazzi et al.: modulus 5; rows of 3 to 40 tokens in training and 40 to 256 in the test, the answer counted (here it is
not); two layers of width 128, 100,000 steps of 256 rows. Their score is (share right - chance) / (1 - chance). Those
are the settings that they ship; the figures that they print took three layers and batches of 1024. From memory, not
checked: with brackets none of their models scores above 0.20, which is 0.36 right; the goal there is 0.35.

Chance: the share of two rows that have the same answer, computed exactly; above 1 / modulus, for products are often 0.
No plateau: a number of the row is as likely right as any.
"""

import dataclasses
import functools

import numpy as np

from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, empty, in_blocks, whole
from training.data import DataError

_NUMBERS, _SIGNS, _LENGTH, _SPLITS = range(4)  # streams of draws
_PLUS, _MINUS, _TIMES, _EQUALS, _OPEN, _CLOSE = range(6)  # words behind the numbers


@dataclasses.dataclass(frozen=True)
class Arithmetic(Task):
    """modulus, brackets, times, shortest: the law, as above. length: tokens of the longest row."""

    modulus: int = 5
    length: int = 40
    shortest: int = 2
    brackets: bool = False
    times: bool = True

    def __post_init__(self):
        whole(self, modulus=2, shortest=2)
        if self.shortest > self.length:
            raise DataError(f"Arithmetic.shortest is {self.shortest}: it must be at most length, {self.length}")
        for field in ("shortest", "length"):
            value = getattr(self, field)
            if value % 2 and not self.brackets:
                raise DataError(f"Arithmetic.{field} is {value}: without brackets it must be even, `=` included")

    @property
    def vocab(self) -> int:
        return self.modulus + (6 if self.brackets else 4)

    @property
    def asked(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        shares = _bracketed_shares if self.brackets else _plain_shares
        step = 1 if self.brackets else 2
        share_M = shares(self.modulus, self.length, self.times)[self.shortest : self.length + 1 : step].mean(0)
        return float(np.sum(share_M**2))

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        step = 1 if self.brackets else 2
        options = (self.length - self.shortest) // step + 1
        length_N = self.shortest + step * draws.integers(seed, _LENGTH, index_N, 1, options)[:, 0]
        make = self._bracketed if self.brackets else self._plain
        ids_NT, labels_NT = empty(len(index_N), self.length)
        words_TN, value_N = make(seed, index_N, length_N)
        ids_NT[:] = words_TN.T
        np.put_along_axis(ids_NT, length_N[:, None] - 1, np.int32(self.modulus + _EQUALS), 1)
        np.put_along_axis(labels_NT, length_N[:, None] - 1, value_N[:, None].astype(np.int32), 1)
        return Rows(ids_NT, labels_NT, {}, length_N)

    def _plain(self, seed: int, index_N: Ints, length_N: Ints) -> tuple[Ints, Ints]:
        """Words by place, as if all rows were the longest, and the value of each row's own expression."""
        T, m = self.length, self.modulus
        words_TN = np.empty([T, len(index_N)], np.int64)
        words_TN[::2] = draws.integers(seed, _NUMBERS, index_N, T // 2, m).T
        words_TN[1::2] = m + draws.integers(seed, _SIGNS, index_N, T // 2, 3 if self.times else 2).T
        sum_N, term_N, value_N = np.zeros_like(length_N), words_TN[0], np.empty_like(length_N)
        np.copyto(value_N, term_N, where=length_N == 2)
        for t in range(2, T, 2):
            number_N, sign_N = words_TN[t], words_TN[t - 1] - m
            times_N = sign_N == _TIMES
            sum_N = sum_N + np.where(times_N, 0, term_N)
            term_N = np.where(times_N, term_N * number_N % m, np.where(sign_N == _MINUS, -number_N, number_N))
            np.copyto(value_N, (sum_N + term_N) % m, where=length_N == t + 2)
        return words_TN, value_N

    def _bracketed(self, seed: int, index_N: Ints, length_N: Ints) -> tuple[Ints, Ints]:
        T, N, m = self.length, len(index_N), self.modulus
        number_TN = np.ascontiguousarray(draws.integers(seed, _NUMBERS, index_N, T, m).T)
        sign_TN = np.ascontiguousarray(draws.integers(seed, _SIGNS, index_N, T, 3 if self.times else 2).T)
        split_TN = np.ascontiguousarray(draws.integers(seed, _SPLITS, index_N, T, 1 << 31).T)
        words_TN, size_TN = np.zeros([T + 4, N], np.int64), np.zeros([T + 4, N], np.int64)
        right_TN = np.zeros([T, N], np.int64)  # where the second part of an expression begins
        size_TN[0] = length_N - 1
        words, sizes = words_TN.ravel(), size_TN.ravel()
        # From left to right: the expression that begins at t, of so many tokens, says its own words and where its two
        # parts begin. A row has one at some places only.
        for t in range(T - 1):
            wide = np.flatnonzero(size_TN[t] >= 5)
            size = size_TN[t, wide]
            left = 1 + ((split_TN[t, wide] * (size - 4)) >> 31)
            at = t * N + wide
            words[at] = m + _OPEN
            words[at + (left + 1) * N] = m + sign_TN[t, wide]
            words[at + (size - 1) * N] = m + _CLOSE
            sizes[at + N] = left
            sizes[at + (left + 2) * N] = size - left - 3
            right_TN[t, wide] = t + left + 2
            small = np.flatnonzero((size_TN[t] > 0) & (size_TN[t] < 5))
            size, at = size_TN[t, small], t * N + small
            in_brackets, minus = size >= 3, size % 2 == 0
            words[at[in_brackets]] = m + _OPEN
            words[(at + (size - 1) * N)[in_brackets]] = m + _CLOSE
            words[(at + in_brackets * N)[minus]] = m + _MINUS
            words[at + (in_brackets + minus * 1) * N] = number_TN[t, small]
        # From right to left, so that the parts are known before the whole.
        value_TN = np.where(size_TN[:T] % 2 == 0, -number_TN, number_TN)
        for t in range(T - 6, -1, -1):
            wide = np.flatnonzero(size_TN[t] >= 5)
            left, right = value_TN[t + 1, wide], value_TN[right_TN[t, wide], wide]
            sign = sign_TN[t, wide]
            value = np.where(sign == _TIMES, left * right, np.where(sign == _MINUS, left - right, left + right))
            value_TN[t, wide] = value % m
        return words_TN[:T], value_TN[0] % m


def _combined(left_M: np.ndarray, right_M: np.ndarray, signs: int) -> np.ndarray:
    """Shares of a o b, when (a, b) have shares summed over `left_M` by `right_M`, [..., M], and o is uniform."""
    pair_MM = left_M.reshape(-1, left_M.shape[-1]).T @ right_M.reshape(-1, right_M.shape[-1])
    m = len(pair_MM)
    a, b = np.meshgrid(np.arange(m), np.arange(m), indexing="ij")
    results = np.stack((a + b, a - b, a * b)[:signs]) % m
    return np.bincount(results.ravel(), np.tile(pair_MM.ravel(), signs), m) / signs


@functools.lru_cache(64)
def _bracketed_shares(m: int, length: int, times: bool) -> np.ndarray:
    """Shares of each value among rows of 0..length tokens: [length + 1, m]."""
    share_TM = np.zeros([length + 1, m])
    share_TM[2:6] = 1 / m  # a number, with a minus or brackets or not
    for t in range(6, length + 1):
        # Rows of t tokens have an expression of t - 1, its parts together t - 4.
        left = share_TM[2 : t - 3]
        share_TM[t] = _combined(left, left[::-1], 3 if times else 2) / len(left)
    return share_TM


@functools.lru_cache(64)
def _plain_shares(m: int, length: int, times: bool) -> np.ndarray:
    share_TM = np.zeros([length + 1, m])
    state_MM = np.zeros([m, m])  # of the sum and the last product in hand
    state_MM[0] = 1 / m
    total, term = np.meshgrid(np.arange(m), np.arange(m), indexing="ij")
    for t in range(2, length + 1, 2):
        share_TM[t] = np.bincount(((total + term) % m).ravel(), state_MM.ravel(), m)
        # After + or - the sum has the product, and any number is in hand; after * the product is multiplied.
        fresh = np.repeat(share_TM[t][:, None] / m, m, axis=1)
        multiplied = np.zeros([m, m])
        for number in range(m):
            np.add.at(multiplied, (total, term * number % m), state_MM / m)
        state_MM = (2 * fresh + multiplied) / 3 if times else fresh
    return share_TM


def _trial(law: Arithmetic) -> Trial:
    """Trained to 40 tokens, asked to eight times as many; not the shortest, of which there are few."""
    ranges = ((12, 40), (42, 80), (82, 160), (162, 320))
    tests = tuple(Part(dataclasses.replace(law, shortest=low, length=high), 256) for low, high in ranges)
    return Trial(
        Probe(B=32, train=(Part(law),), test=tests),
        steps=3_000,
        lr=3e-3,
        blocks=2,
        mlp=True,
        goal=_goal(law),
        about=_about(law),
    )


def _smoke(law: Arithmetic) -> Trial:
    longer = dataclasses.replace(law, shortest=18, length=32)
    data = Probe(B=64, train=(Part(law),), test=(Part(_not_short(law), 128), Part(longer, 128)))
    return Trial(data, steps=500, mlp=True, goal=_goal(law), about=_about(law))


def _paper(law: Arithmetic) -> Trial:
    long = dataclasses.replace(law, shortest=40, length=256)
    data = Probe(B=256, train=(Part(law),), test=(Part(_not_short(law), 8_192), Part(long, 8_192)))
    return Trial(data, steps=100_000, lr=1e-3, D=128, blocks=2, goal=_goal(law), about=_about(law))


def _not_short(law: Arithmetic) -> Arithmetic:
    return dataclasses.replace(law, shortest=12)


def _goal(law: Arithmetic) -> float:
    return 0.35 if law.brackets else 0.99


def _about(law: Arithmetic) -> str:
    return f"Modular arithmetic with{'' if law.brackets else 'out'} brackets: what is the value of an expression?"


_BRACKETS = Arithmetic(brackets=True, times=False)

trials = {
    "mod_arithmetic": _trial(Arithmetic()),
    "mod_arithmetic@smoke": _smoke(Arithmetic(length=16)),
    "mod_arithmetic@paper": _paper(Arithmetic()),
    "mod_brackets": _trial(_BRACKETS),
    "mod_brackets@smoke": _smoke(dataclasses.replace(_BRACKETS, length=16)),
    "mod_brackets@paper": _paper(_BRACKETS),
}
