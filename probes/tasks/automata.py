"""Languages learnt in context, by the law of RegBench (Akyürek et al. 2024, arXiv 2401.12973): what may follow?

    c a f a | a f | c c a f ... |        at a letter or `|`, the label is the next letter; never `|`

A row is of one language, words of which stand between `|`. The language is of an automaton: at each state some letters
may follow, each leading to another state; every state may end a word. What a model must find out from the row is the
automaton, and in which state it is.

* An automaton has edges + 1 to `nodes` states and edges + 1 to `letters` letters of its own, both uniform. Each state
  has 1 to `edges` letters, different ones, that lead to different other states. The first state begins every word.
* States that cannot be reached are taken out, and those of the same future are made one, so that automata of one
  language are one automaton. `automata` different ones come first: those to train on (`part` "train"); then
  `held_out` others, none of them among the first ("held_out"). They are drawn from `pool`, a seed.
* Rows go round the automata, in another order each time: so many rows as there are automata have each once. A row is
  of `fewest` to `most` words of 1 to `longest` letters, all uniform, and is cut at `length`. Each letter is uniform
  among those that may follow.

The label is the letter that does follow, and right is any that may (`legal`).

Automata are compared as languages here; RegBench's are compared as objects, of which no two are the same. It has 5,000
of them for training, a row each in every epoch (200 epochs in batches of 32 at 5e-4), and 250 and 250 to choose and to
test by; its rows are padded with a word of their own, ours by the frame. Its figures are curves alone.

Chance: a letter of another automaton's row. Plateau: a letter of the row, drawn; more where the row has few. Both are
computed from the automata, with the letters of words as they are on average. What can be had, measured on rows of
automata held out: the commonest letter so far after the longest run of letters and marks (up to five) that was seen
before, an n-gram model learnt in context with back-off, is right in 0.88 of the questions at 128 tokens, 0.93 at 256
and 0.95 at 512; one that is told the automaton's state, and says the commonest letter so far there, in 0.95, 0.98 and
0.98. The steps to the goal are counted on automata held out.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from layers.fields import one_of
from probes.tasks import draws
from probes.tasks.task import Ints, Part, Probe, Rows, Task, Trial, by_question, empty, in_blocks, whole
from training.data import DataError

_ORDER, _WORDS, _SIZES, _LETTERS = range(4)  # streams of draws, of rows
_STATES, _ALPHABET, _OWN, _DEGREE, _SYMBOL, _TARGET = range(6)  # and of the pool
_CANDIDATES = 1024  # automata drawn at a time; the pool does not depend on it
Form = tuple[tuple[tuple[int, int], ...], ...]  # by state: (letter, next state), in order; the first state begins


@dataclasses.dataclass(frozen=True)
class Automata(Task):
    """letters, nodes, edges, fewest, most, longest, automata, held_out, pool, part: the law, as above.

    length: tokens of the longest row.
    """

    length: int = 256
    letters: int = 18
    nodes: int = 12
    edges: int = 3
    fewest: int = 10
    most: int = 19
    longest: int = 49
    automata: int = 500
    held_out: int = 128
    pool: int = 0
    part: Literal["train", "held_out"] = "train"

    def __post_init__(self):
        one_of(self)
        whole(self, length=3, edges=1, fewest=2, most=self.fewest, longest=1, automata=1, held_out=1)
        if not self.edges < self.letters <= 61:
            raise DataError(f"Automata.letters is {self.letters}: it must be above edges, {self.edges}, and at most 61")
        if self.nodes <= self.edges:
            raise DataError(f"Automata.nodes is {self.nodes}: it must be above edges, {self.edges}")

    @property
    def vocab(self) -> int:
        return self.letters + 1

    @property
    def asked(self) -> int:
        return self.length - 1

    @functools.cached_property
    def languages(self) -> tuple[Form, ...]:
        """The automata of this part."""
        every = _pool(self.letters, self.nodes, self.edges, self.automata + self.held_out, self.pool)
        return every[: self.automata] if self.part == "train" else every[self.automata :]

    @functools.cached_property
    def tables(self) -> "_Tables":
        return _Tables.of(self.languages, self.letters, math.lcm(*range(1, self.edges + 1)))

    @property
    def chance(self) -> float:
        return self._shares[0]

    @property
    def plateau(self) -> float:
        return self._shares[1]

    @functools.cached_property
    def _shares(self) -> tuple[float, float]:
        said_PL, legal_PL = self.tables.average(self.longest)
        return float(said_PL.mean(0) @ legal_PL.mean(0)), float(np.sum(said_PL * legal_PL, 1).mean())

    def rows(self, seed: int, index_N: Ints) -> Rows:
        return in_blocks(lambda index: self._rows(seed, index), index_N, self.length)

    def _rows(self, seed: int, index_N: Ints) -> Rows:
        N, T, tables = len(index_N), self.length, self.tables
        P, width = len(tables.first), tables.width
        start_N = tables.first[_dealt(seed, index_N, P)]
        words_N = self.fewest + draws.integers(seed, _WORDS, index_N, 1, self.most - self.fewest + 1)
        size_NW = 1 + draws.integers(seed, _SIZES, index_N, self.most, self.longest)
        end_NW = np.cumsum(size_NW + 1, 1)  # where the next word begins, behind the `|`
        length_N = np.minimum(np.take_along_axis(end_NW, words_N - 1, 1) - 1, T)[:, 0]
        mark_NT = np.zeros([N, T + 1], bool)
        np.put_along_axis(mark_NT, np.minimum(end_NW - 1, T), True, 1)
        mark_TN = np.ascontiguousarray(mark_NT[:, :T].T)
        draw_TN = np.ascontiguousarray(draws.integers(seed, _LETTERS, index_N, T, width).T)
        word_TN, state_TN = np.empty([T, N], np.int64), np.empty([T, N], np.int64)
        # A state is the place of its edges in the table; an edge says the next state, and the letter in the last bits.
        state_N = start_N
        for t in range(T):
            edge_N = tables.edges[state_N + draw_TN[t]]
            np.right_shift(edge_N, _BITS, out=state_TN[t])
            np.copyto(state_TN[t], start_N, where=mark_TN[t])
            state_N = state_TN[t]
            np.bitwise_and(edge_N, (1 << _BITS) - 1, out=word_TN[t])
        np.copyto(word_TN, self.letters, where=mark_TN)
        ids_NT, labels_NT = empty(N, T)
        ids_NT[:] = word_TN.T
        asked_NT = (ids_NT[:, 1:] != self.letters) & (np.arange(1, T) < length_N[:, None])
        np.copyto(labels_NT[:, :-1], ids_NT[:, 1:], where=asked_NT)
        legal_NT = tables.legal[state_TN[:-1].T // width]
        return Rows(ids_NT, labels_NT, by_question(asked_NT, T - 1, legal=legal_NT), length_N)


_BITS = 6  # of a letter in an edge


class _Tables(NamedTuple):
    """Automata as arrays. States are numbered through; `width` is a number that every count of edges divides.

    first: where each automaton's first state has its edges, [P]. edges: of each state `width`, each of its own equally
    often, as (next state's place << _BITS) + letter. legal: a bit for each letter of each state.
    """

    first: Ints
    edges: Ints
    legal: Ints
    letters: int
    width: int

    @staticmethod
    def of(forms: tuple[Form, ...], letters: int, width: int) -> "_Tables":
        first = np.cumsum([0] + [len(form) for form in forms])
        edges, legal = [], []
        for begin, form in zip(first.tolist(), forms, strict=False):
            for state in form:
                out = [((begin + after) * width << _BITS) + letter for letter, after in state]
                edges.append(np.repeat(out, width // len(out)))
                legal.append(sum(1 << letter for letter, _ in state))
        return _Tables(first[:-1] * width, np.concatenate(edges), np.array(legal), letters, width)

    def average(self, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a random letter of a word of 1..longest: what it is, and whether each may stand there. [P, letters]"""
        P, states = len(self.first), len(self.legal)
        letter_E, after_E = self.edges & (1 << _BITS) - 1, (self.edges >> _BITS) // self.width
        from_E = np.repeat(np.arange(states), self.width)
        here_S: np.ndarray = np.zeros(states)
        sum_S = np.zeros(states)
        here_S[self.first // self.width] = 1
        for k in range(longest):
            sum_S += here_S * (longest - k)  # so many of `longest` words have a letter here
            here_S = np.bincount(after_E, here_S[from_E] / self.width, states)
        sum_S /= longest * (longest + 1) / 2
        owner_S = np.searchsorted(self.first, np.arange(states) * self.width, side="right") - 1
        cell_E = owner_S[from_E] * self.letters + letter_E
        said = np.bincount(cell_E, sum_S[from_E] / self.width, P * self.letters).reshape(P, -1)
        may_SL = self.legal[:, None] >> np.arange(self.letters) & 1
        legal = np.zeros_like(said)
        np.add.at(legal, owner_S, sum_S[:, None] * may_SL)
        return said, legal


def _dealt(seed: int, index_N: Ints, count: int) -> Ints:
    """Which automaton each row is of: in each round of `count` rows all of them, in an order of its own."""
    round_N, which_N = np.divmod(index_N, count)
    for number in np.unique(round_N).tolist():
        here = round_N == number
        which_N[here] = _order(draws.fold(seed, number), count)[which_N[here]]
    return which_N


@functools.lru_cache(8)
def _order(seed: int, count: int) -> Ints:
    return draws.permutation(seed, _ORDER, count)


@functools.lru_cache(8)
def _pool(letters: int, nodes: int, edges: int, count: int, seed: int) -> tuple[Form, ...]:
    """The first so many different automata of an endless sequence of draws."""
    found: dict[Form, None] = {}
    for begin in range(0, 64 * count + _CANDIDATES, _CANDIDATES):
        for raw in candidates(letters, nodes, edges, seed, np.arange(begin, begin + _CANDIDATES)):
            found[smallest(raw)] = None
            if len(found) == count:
                return tuple(found)
    raise DataError(
        f"Automata.automata is {count} with those held out: of {nodes} nodes and {letters} letters there are hardly "
        f"more than {len(found)}"
    )


def candidates(letters: int, nodes: int, edges: int, seed: int, index_N: Ints) -> list[list[dict[int, int]]]:
    """Automata as drawn: of each, by state, which letter leads to which state."""
    N = len(index_N)
    states_N = edges + 1 + draws.integers(seed, _STATES, index_N, 1, nodes - edges)
    own_N = edges + 1 + draws.integers(seed, _ALPHABET, index_N, 1, letters - edges)
    alphabet_NL = draws.distinct(seed, _OWN, index_N, letters, letters)
    degree_NS = 1 + draws.integers(seed, _DEGREE, index_N, nodes, edges)
    symbol_NSE = draws.motifs(seed, _SYMBOL, index_N, nodes, edges, own_N)
    letter_NSE = np.take_along_axis(alphabet_NL, symbol_NSE.reshape(N, -1), 1).reshape(symbol_NSE.shape)
    after_NSE = draws.motifs(seed, _TARGET, index_N, nodes, edges, states_N - 1)
    after_NSE += after_NSE >= np.arange(nodes)[:, None]  # to another state
    letter: Any = letter_NSE.tolist()
    after: Any = after_NSE.tolist()
    degree: Any = degree_NS.tolist()
    return [
        [dict(zip(letter[n][s][:d], after[n][s][:d], strict=True)) for s, d in enumerate(degree[n][:states])]
        for n, states in enumerate(states_N[:, 0].tolist())
    ]


def smallest(raw: list[dict[int, int]]) -> Form:
    """The smallest automaton of the same language, its states in the order in which words may reach them.

    Two automata have one language if and only if this is the same.
    """
    kind = [0] * len(raw)  # states that no word of so many letters tells apart
    kinds = 1
    while True:
        futures = [(kind[s], *sorted((a, kind[b]) for a, b in out.items())) for s, out in enumerate(raw)]
        numbers: dict[Any, int] = {}
        kind = [numbers.setdefault(future, len(numbers)) for future in futures]
        if len(numbers) == kinds:
            break
        kinds = len(numbers)
    some = {k: s for s, k in enumerate(kind)}  # a state of each kind
    order, form = [kind[0]], []
    for k in order:  # longer with each new kind that is reached
        state = []
        for letter, after in sorted(raw[some[k]].items()):
            if kind[after] not in order:
                order.append(kind[after])
            state.append((letter, order.index(kind[after])))
        form.append(tuple(state))
    return tuple(form)


def _asked(law: Automata, rows: int, *lengths: int) -> tuple[Part, ...]:
    """New rows of the automata trained on, and rows of others, longer and longer."""
    others = (dataclasses.replace(_others(law), length=length) for length in lengths)
    return tuple(Part(test, rows) for test in (law, *others))


def _others(law: Automata) -> Automata:
    return dataclasses.replace(law, part="held_out")


_LAW = Automata(length=128)
_SMALL = Automata(length=128, automata=64, held_out=64)
_PAPER = Automata(length=949, automata=5_000, held_out=250)

trials = {
    "languages": Trial(
        Probe(B=32, train=(Part(_LAW),), test=_asked(_LAW, 128, 128, 256, 512, 949)),
        steps=1_000,
        lr=3e-3,
        blocks=2,
        mlp=True,
        goal=0.85,
        watched=_others(_LAW),
    ),
    "languages@smoke": Trial(
        Probe(B=32, train=(Part(_SMALL),), test=_asked(_SMALL, 64, 128)),
        steps=300,
        mlp=True,
        goal=0.85,
        watched=_others(_SMALL),
    ),
    # Rows and steps are published; width and depth, of which RegBench tries many, are not.
    "languages@paper": Trial(
        Probe(B=32, train=(Part(_PAPER, 5_000),), test=_asked(_PAPER, 250, 949)),
        steps=200 * 157,
        lr=5e-4,
        D=128,
        blocks=2,
        mlp=True,
        goal=0.95,
        watched=_others(_PAPER),
    ),
}
