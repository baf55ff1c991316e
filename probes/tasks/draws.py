"""Random draws from (seed, index) alone, vectorised over rows.

A row of a probe is a pure function of its seed and its index: the same in any batch, on any machine and any Python.
So nothing here holds a generator; every draw is a hash of (seed, stream, index, number of the draw), in integer
arithmetic and in float64 operations that IEEE 754 rounds exactly. `stream` is a small integer that keeps the draws of
one purpose apart from those of another.
"""

import functools
import math

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64 (Steele, Lea & Flood 2014)
_MASK = (1 << 64) - 1


def _mix(x: Words) -> Words:
    """The finaliser of splitmix64, in place: a bijection of 64-bit words in which every bit reaches every other."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def fold(seed: int, *data: int) -> int:
    """A 64-bit seed made of `seed` and more integers: another one for every other tuple, up to hash collisions."""
    state = 0
    for value in (seed, *data):
        state = int(_mix(np.array([((state ^ value) + _GOLDEN) & _MASK], np.uint64))[0])
    return state


def bits(seed: int, stream: int, index_N: Ints, count: int) -> Words:
    """64 random bits for each of draws 0..count-1 of each row: uint64 [N, count]."""
    key_N = np.uint64(fold(seed, stream)) + index_N.astype(np.uint64) * np.uint64(_GOLDEN)
    step_C = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(_mix(key_N)[:, None] + step_C)


def integers(seed: int, stream: int, index_N: Ints, count: int, below: int | Ints) -> Ints:
    """Draws from 0..below-1, int64 [N, count]; uniform up to a relative bias of below / 2^32.

    below: of all draws, or of each, an array that goes with [N, count].
    """
    words = bits(seed, stream, index_N, (count + 1) // 2).astype("<u8", copy=False)
    halves = words.view("<u4")[:, :count].astype(np.int64)  # two 32-bit draws a word, the low half first
    halves *= below
    halves >>= 32
    return halves


def distinct(seed: int, stream: int, index_N: Ints, count: int, below: int) -> Ints:
    """`count` different integers from 0..below-1, in random order: int64 [N, count], no table of size `below`.

    A row is the first `count` different values of an endless sequence of uniform draws, which is exactly a draw
    without replacement. How far the sequence must be read depends on the row; its values do not.
    """
    if count > below:
        raise ValueError(f"cannot draw {count} different integers from {below}")
    seen = np.arange(count)
    mean, spread = np.sum(below / (below - seen)), np.sqrt(np.sum(seen * below / (below - seen) ** 2.0))
    read = math.ceil(mean + 4 * spread)
    out_NC = np.empty([len(index_N), count], np.int64)
    todo_M = np.arange(len(index_N) if count else 0)
    while len(todo_M):
        value = integers(seed, stream, index_N[todo_M], read, below)
        # Sort by (value, time): the head of each run is that value's first occurrence; then sort those by time.
        value <<= 32
        value += np.arange(read)
        value.sort(axis=1)
        first = np.ones(value.shape, bool)
        np.not_equal(value[:, 1:] >> 32, value[:, :-1] >> 32, out=first[:, 1:])
        by_time = np.where(first, (value & 0xFFFFFFFF) << 32 | value >> 32, np.iinfo(np.int64).max)
        by_time.sort(axis=1)
        enough = by_time[:, count - 1] != np.iinfo(np.int64).max
        out_NC[todo_M[enough]] = by_time[enough, :count] & 0xFFFFFFFF
        todo_M, read = todo_M[~enough], 2 * read
    return out_NC


def motifs(seed: int, stream: int, index_N: Ints, groups: int, count: int, below: int | Ints) -> Ints:
    """Groups of `count` different integers from 0..below-1, each in random order: int64 [N, groups, count].

    For few integers: the work grows with the square of `count`. Of a group, the first some are such a group too.

    below: of all groups, or of each, an array that goes with [N, groups]; where it is less than `count`, only so many
        of a group are different.
    """
    N = len(index_N)
    # The next integer is the draw-th of those that are left.
    left = np.maximum(np.broadcast_to(below, [N, groups])[:, :, None] - np.arange(count), 1)
    out_NGC = integers(seed, stream, index_N, groups * count, left.reshape(N, -1)).reshape(N, groups, count)
    for c in range(1, count):
        taken = np.sort(out_NGC[:, :, :c], axis=2)
        for b in range(c):
            out_NGC[:, :, c] += out_NGC[:, :, c] >= taken[:, :, b]
    return out_NGC


def weighted_order(seed: int, stream: int, index_N: Ints, weights: npt.NDArray[np.float64], count: int) -> Ints:
    """`count` different places of `weights`, drawn one after another without replacement: int64 [N, count].

    Each draw picks among the places left, with probability proportional to their weights. That is the order of arrival
    of independent exponential clocks with these rates, so one sort does all the draws.
    """
    time = exponential(bits(seed, stream, index_N, len(weights)))
    time /= weights
    # Positive floats order like their bits. The place goes where the last bits were, so one sort brings it along.
    key = time.view(np.int64)
    low = (1 << len(weights).bit_length()) - 1
    key &= ~low
    key |= np.arange(len(weights))
    key.sort(axis=1)
    return key[:, :count] & low


def slots(seed: int, stream: int, index_N: Ints, space: int, exponent: float, count: int) -> Ints:
    """`count` different ones of `space` slots, drawn one after another, slot g with weight (g+1)^(exponent-1)."""
    return weighted_order(seed, stream, index_N, _power_law(space, exponent), count)


@functools.lru_cache(64)
def _power_law(space: int, exponent: float) -> npt.NDArray[np.float64]:
    # Rounded, so that the last bit of a machine's power function is not in the law.
    return np.round(np.arange(1, space + 1) ** (exponent - 1) * 2.0**40)


def orders(seed: int, stream: int, index_N: Ints, count: int) -> Ints:
    """A random order of 0..count-1 for each row: int64 [N, count]."""
    key = bits(seed, stream, index_N, count)
    # As above: a number's place in its last bits, so that one sort brings it along.
    low = np.uint64((1 << count.bit_length()) - 1)
    key &= ~low
    key |= np.arange(count, dtype=np.uint64)
    key.sort(axis=1)
    return (key & low).astype(np.int64)


def others(not_NK: Ints, draw_NL: Ints) -> Ints:
    """The draw_NL-th integer (from 0) of those that are not among not_NK, K different ones: int64 [N, L]."""
    # Integer d + j is that one when j of the excluded are below it: those, in order, with excluded[i] - i <= d. One
    # search serves all rows, each in a range of numbers of its own.
    N, K = not_NK.shape
    gap_NK = np.sort(not_NK, 1) - np.arange(K)
    span = max(gap_NK.max(initial=0), draw_NL.max(initial=0)) + 1
    row_N = np.arange(N)[:, None]
    below = np.searchsorted((row_N * span + gap_NK).ravel(), (row_N * span + draw_NL).ravel(), side="right")
    return draw_NL + below.reshape(draw_NL.shape) - row_N * K


def besides(seed: int, stream: int, index_N: Ints, count: int, below: int, not_NK: Ints) -> Ints:
    """Draws from those of 0..below-1 that are not among a row's not_NK, K different ones: int64 [N, count]."""
    return others(not_NK, integers(seed, stream, index_N, count, below - not_NK.shape[1]))


def markov(seed: int, stream: int, index_N: Ints, count: int, words: int, branches: int, chain: int) -> Ints:
    """A text of each row, int64 [N, count], by a chain over words 0..words-1 that `chain` fixes for all rows.

    Two words determine `branches` different ones, of which the next is one at random; the two before the first are
    uniform. The text says log2(branches) bits a word, and no word of it is more than locally determined.
    """
    table, seed = _successors(chain, words, branches), fold(seed, stream)
    choice_CN = np.ascontiguousarray(integers(seed, 0, index_N, count, branches).T)
    text_CN = np.empty([count + 2, len(index_N)], np.int64)
    text_CN[:2] = integers(seed, 1, index_N, 2, words).T
    for c in range(count):
        after = text_CN[c] * words
        after += text_CN[c + 1]
        after *= branches
        after += choice_CN[c]
        text_CN[c + 2] = table[after]
    return text_CN[2:].T


@functools.lru_cache(8)
def _successors(chain: int, words: int, branches: int) -> Ints:
    """What may follow each pair of words: int64 [words · words · branches], by pair."""
    return distinct(chain, 0, np.arange(words * words), branches, words).ravel()


def permutation(seed: int, stream: int, count: int) -> Ints:
    """A random order of 0..count-1: int64 [count]."""
    words = bits(seed, stream, np.zeros(1, np.int64), count)[0]
    return np.argsort(words, kind="stable")


def exponential(words: Words) -> npt.NDArray[np.float64]:
    """Standard exponential draws, float64, from 64-bit words: -log of a uniform draw in (0, 1).

    The logarithm is spelled out because libraries round theirs differently in the last bit: with frexp, sums, products
    and quotients alone every machine gets the same number (absolute error below 1e-14).
    """
    uniform = (words >> np.uint64(11)).astype(np.float64)
    uniform += 0.5
    mantissa, power = np.frexp(uniform)  # mantissa in [1/2, 1)
    centre = math.sqrt(0.5)
    z = (mantissa - centre) / (mantissa + centre)  # log(mantissa / centre) = 2 artanh(z), |z| < 0.172
    square = z * z
    series = np.full_like(z, 2 / 17)
    for odd in range(15, 0, -2):
        series *= square
        series += 2 / odd
    series *= z
    # -log(uniform · 2^-53) = (53 + 1/2 - power) log 2 - 2 artanh(z)
    return (53.5 - power) * math.log(2) - series
